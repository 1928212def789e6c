"""Perplexity, memory and speed of subspace optimizers on real text: a LLaMA with hidden size 256 on CPU, equal tokens.

    nice python benchmarks/pretrain_text.py --data TEXT --tokenizer TOKENIZER --out results.jsonl [--jobs 2]
    python benchmarks/pretrain_text.py --table results.jsonl [--figure curves.png]

Stages, in this order: `tune` (each method at three learning rates, a quarter of the tokens, seed 0), `compare` (each
method at its best rate, three seeds), `length` (three methods, sequences of 256 to 1024 tokens, equal tokens a step).
Each run is its own process and appends a line to --out when it ends; runs with a line there are skipped.
Two thirds of the parameters are projected (6 layers, vocabulary 5,120, rank 64).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODEL = {"hidden": 256, "mlp": 688, "layers": 6, "heads": 4, "vocab_size": 5120, "positions": 1024}
RANK, STEP_TOKENS, LENGTHS, SEEDS = 64, 1024, (256, 512, 1024), (0, 1, 2)
GALORE = {"rank": RANK, "update_proj_gap": 50, "scale": 0.25}
FACTORS = (0.5, 1.0, 2.0)  # of the rates below, which are the papers'

# name: (optimizer, its options, learning rate)
METHODS: dict[str, tuple[str, dict[str, Any], float]] = {
    "AdamW": ("adamw", {}, 2e-3),
    "GaLore": ("galore_adamw", GALORE, 1e-2),
    "OSD, P by AdamW": ("galore_adamw", {**GALORE, "proj_type": "continuous"}, 1e-2),
    "OSD, P by 8-bit Adam": ("galore_adamw", {**GALORE, "proj_type": "continuous_adam8bit"}, 1e-2),
    "OSD, P by Lion": ("galore_adamw", {**GALORE, "proj_type": "continuous_lion"}, 1e-2),
    "OSD, P by SGD": ("galore_adamw", {**GALORE, "proj_type": "continuous_sgd"}, 1e-2),
    "OSD, P by Adafactor": ("galore_adamw", {**GALORE, "proj_type": "continuous_adafactor"}, 1e-2),
    "Fira": ("fira", GALORE, 1e-2),
    "APOLLO": ("apollo", {"rank": RANK, "update_proj_gap": 50}, 1e-2),
}
# Where P alone moves otherwise, the rate is not tuned again.
SAME_RATE = {method: "OSD, P by AdamW" for method in METHODS if method.startswith("OSD") and "by AdamW" not in method}
BY_LENGTH = ("AdamW", "GaLore", "OSD, P by AdamW")


def job(args: argparse.Namespace, stage: str, method: str, lr: float, seed: int = 0, length: int = 256) -> dict:
    """The identity of a run: a line of the results without its numbers."""
    tokens = args.tokens // 4 if stage == "tune" else args.tokens
    return {"stage": stage, "method": method, "lr": lr, "seed": seed, "length": length, "tokens": tokens}


def jobs(args: argparse.Namespace, stage: str, done: list[dict]) -> Iterator[dict]:
    """The runs of a stage."""
    if stage == "tune":
        for method, (_, _, lr) in METHODS.items():
            if method not in SAME_RATE:
                yield from (job(args, stage, method, lr * factor) for factor in FACTORS)
        return
    if stage == "compare":
        for seed in SEEDS:
            yield from (job(args, stage, method, best_lr(method, done), seed) for method in METHODS)
        return
    for length in LENGTHS:
        yield from (job(args, stage, method, best_lr(method, done), 0, length) for method in BY_LENGTH)


def best_lr(method: str, done: list[dict]) -> float:
    """The best learning rate of the tuning, or the paper's if there was none."""
    method = SAME_RATE.get(method, method)
    tuned = [line for line in done if line["stage"] == "tune" and line["method"] == method]
    return min(tuned, key=lambda line: line["loss"])["lr"] if tuned else METHODS[method][2]


def settings(known: dict, data: str, tokenizer: str) -> dict[str, Any]:
    """A run as arguments of `lilliput.pretrain`."""
    optimizer, options, _ = METHODS[known["method"]]
    return {
        "model": "llama_20m", "model_options": MODEL, "data": data, "tokenizer": tokenizer, "seed": known["seed"],
        "max_length": known["length"], "batch_size": STEP_TOKENS // known["length"], "tokens": known["tokens"],
        "optimizer": optimizer, "optimizer_options": options, "lr": known["lr"], "clip": 1.0, "log_every": 10,
        "eval_every": 10**9, "eval_tokens": "40K",
    }  # fmt: skip


def one(known: dict, data: str, tokenizer: str) -> dict:
    """Run a job in this process; returns its line of the results."""
    import lilliput

    started = time.process_time()
    result = lilliput.pretrain(**settings(known, data, tokenizer))
    rows, last = result.rows, result.rows[-1]
    from lilliput import optim

    projected = optim.param_groups(result.model, RANK)[0]["params"]
    return {
        **known,
        "loss": last["loss"],
        "perplexity": last["perplexity"],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
        "cpu_seconds": time.process_time() - started,
        "peak_memory_bytes": last["peak_memory_bytes"],
        "state_bytes": last["state_bytes"],
        "projected_share": sum(p.numel() for p in projected) / sum(p.numel() for p in result.model.parameters()),
        "curve": [(row["tokens"], row["train_loss"]) for row in rows],
    }


def run(args: argparse.Namespace) -> None:
    """Run what is missing of each stage, --jobs processes at a time."""
    out = Path(args.out)
    for stage in args.stages:
        done = read(out)
        have = [{key: line[key] for key in job(args, stage, "", 0.0)} for line in done]
        missing = [known for known in jobs(args, stage, done) if known not in have]
        print(f"{stage}: {len(missing)} runs to go", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            for line in pool.map(lambda known: child(known, args), missing):
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{line['method']}, lr {line['lr']:g}, seed {line['seed']}, length {line['length']}: perplexity "
                      f"{line['perplexity']:.2f}, {line['cpu_seconds']:.0f} CPU s", flush=True)  # fmt: skip


def child(known: dict, args: argparse.Namespace) -> dict:
    """Run a job in its own process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one", json.dumps(known), "--data", args.data, "--tokenizer", args.tokenizer]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise RuntimeError(f"{known} failed:\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def read(path: Path) -> list[dict]:
    """The lines of the results that are whole."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def table(path: Path) -> None:
    """The results as tables in Markdown."""
    done = read(path)
    compared = [line for line in done if line["stage"] == "compare"]
    print("| method | lr | perplexity | state MB | peak RSS MB | tokens/s |\n|---|---|---|---|---|---|")
    for method in METHODS:
        lines = [line for line in compared if line["method"] == method]
        if lines:
            print(f"| {method} | {lines[0]['lr']:g} | {spread([x['perplexity'] for x in lines])} "
                  f"| {lines[0]['state_bytes'] / 1e6:.1f} | {max(x['peak_memory_bytes'] for x in lines) / 1e6:.0f} "
                  f"| {statistics.median(x['tokens_per_second'] for x in lines):,.0f} |")  # fmt: skip
    print(f"\n| perplexity by length | {' | '.join(map(str, LENGTHS))} |\n|---|{'---|' * len(LENGTHS)}")
    for method in BY_LENGTH:
        found = {line["length"]: line for line in done if (line["stage"], line["method"]) == ("length", method)}
        if found:
            cells = [f"{found[n]['perplexity']:.2f}" if n in found else "" for n in LENGTHS]
            print(f"| {method} | {' | '.join(cells)} |")


def figure(path: Path, to: str) -> None:
    """Training loss against tokens, the mean of the seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for method in METHODS:
        curves = [x["curve"] for x in read(path) if (x["stage"], x["method"]) == ("compare", method)]
        if curves:
            mean = [[statistics.fmean(v) for v in zip(*points, strict=True)] for points in zip(*curves, strict=True)]
            axes.plot(*zip(*mean, strict=True), label=method)
    axes.set(xlabel="tokens", ylabel="training loss, mean of the seeds")
    axes.legend(fontsize=8)
    fig.savefig(to, dpi=150)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file or folder of text, with its own validation file")
    parser.add_argument("--tokenizer", help="a folder; about 5,000 tokens")
    parser.add_argument("--out", default="pretrain_text.jsonl", help="where results are kept")
    parser.add_argument("--tokens", type=int, default=163_840, help="of a full run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--stages", nargs="+", default=["tune", "compare", "length"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--table", metavar="FILE", help="print the tables of results and stop")
    parser.add_argument("--figure", metavar="FILE", help="with --table: draw the curves")
    args = parser.parse_args()
    if args.table:
        table(Path(args.table))
        if args.figure:
            figure(Path(args.table), args.figure)
    elif args.one:
        print(json.dumps(one(json.loads(args.one), args.data, args.tokenizer)))
    elif not args.data or not args.tokenizer:
        parser.error("give --data and --tokenizer")
    else:
        run(args)


if __name__ == "__main__":
    main()
