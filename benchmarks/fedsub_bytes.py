"""Bytes of a round and simulated time on LLaMA: FedSub, FedAvg and P = I, compared with the published figures.

    python benchmarks/fedsub_bytes.py [--model llama_60m] [--json]

Nothing is trained: the dry engine runs the methods' own rounds on tensors without values, with two clients, ten steps a
round of 64 sequences of 1024 tokens, and a new P every five rounds, as published.  Bytes are the payload of one client
and one round; headers are separate.  Every row is checked against the closed formula, in float32:

    FedAvg   4 N up and down
    FedSub   4 (sum of m r + ordinary) up and down, the model 4 N down before round 1; svd, when P is new, also a sketch
             4 sum of (r + 8) n up and P, 4 sum of r n, down
    for layers of m x n in a subspace of rank r; ordinary is the other parameters if they are averaged, else 0

Seconds are those of the ledger's clock: download, computation and upload, one after the other.  The device's speed is
chosen so that FedAvg's step of LLaMA-60M takes the published time.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from lilliput import Experiment
from lilliput.algorithms import FedAvg, FedSub
from lilliput.core.fleet import Profile
from lilliput.data.batches import ListBatches
from lilliput.engines.dry import predict
from lilliput.engines.prediction import RoundCost
from lilliput.models.transformers import empty
from lilliput.optim.basis import sketch_rows
from lilliput.subspace import matched
from lilliput.tasks import Supervised

TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
CLIENTS, TAU, REFRESH, BATCH, LENGTH = 2, 10, 5, 64, 1024
RANKS = (64, 128, 256)
# Of LLaMA-60M, milliseconds of communication and of computation: averages over all steps, of which one in ten sends.
# FedAvg sends its 58.07 M numbers, the others b of the targets alone (of 25.30 M): there, ordinary parameters are each
# client's own, and the dense P that goes to all is not counted.
PUBLISHED = {
    "FedAvg": (393.1, 1074.1), "P = I, frozen": (161.9, 1107.7), "FedSub 64, frozen": (46.5, 1069.6),
    "FedSub 128, frozen": (65.5, 1076.3), "FedSub 256, frozen": (89.2, 1085.9),
}  # fmt: skip
SPEED = 16.39e12 / 1.0741  # FLOP of FedAvg's step on LLaMA-60M, and its published seconds
LINKS = {"100 Mb/s": 100e6, "100 MB/s": 800e6}  # as stated, and what the published figures come to
Sizes = dict[str, tuple[int, int]]  # layer -> (m, n)


def methods() -> dict[str, Any]:
    """The methods to compare, by name."""
    common: dict[str, Any] = {"lr": 1e-3, "local_steps": TAU}
    found: dict[str, Any] = {"FedAvg": FedAvg(**common)}
    common |= {"targets": TARGETS, "refresh": REFRESH}
    for ordinary in ("average", "frozen"):
        found[f"P = I, {ordinary}"] = FedSub(**common, rank=1.0, projection="idx", ordinary=ordinary)
        for rank in RANKS:
            found[f"FedSub {rank}, {ordinary}"] = FedSub(**common, rank=rank, ordinary=ordinary)
    for rank in RANKS:
        found[f"FedSub {rank}, average, svd"] = FedSub(**common, rank=rank, projection="svd")
    return found


def formula(method: Any, numbers: int, sizes: Sizes, first: bool, new: bool) -> dict[str, int]:
    """Bytes of a client's round, up and down."""
    if isinstance(method, FedAvg):
        return {"up": 4 * numbers, "down": 4 * numbers}
    rank = {name: n if method.rank == 1.0 else method.rank for name, (_, n) in sizes.items()}
    both = sum(m * rank[name] for name, (m, _) in sizes.items())
    if method.ordinary == "average":
        both += numbers - sum(m * n for m, n in sizes.values())
    found = {"up": 4 * both, "down": 4 * (both + (numbers if first else 0))}
    if method.projection == "svd" and new:
        found["up"] += 4 * sum(sketch_rows(rank[name], m) * n for name, (m, n) in sizes.items())
        found["down"] += 4 * sum(rank[name] * n for name, (_, n) in sizes.items())
    return found


def seen(cost: RoundCost) -> dict[str, int]:
    """Bytes of a client's round, up and down, and of headers."""
    found = {"up": 0, "down": 0, "headers": 0}
    for (way, kind), n in cost.bytes.items():
        found["headers" if kind == "headers" else way] += n
    return {what: n // CLIENTS for what, n in found.items()}


def row(name: str, method: Any, model: torch.nn.Module, sizes: Sizes) -> dict[str, Any]:
    """Bytes of round 1, of a later round, and of a later one with a new P, checked; FLOPs of a step; peak memory."""
    ids = torch.empty(BATCH, LENGTH, dtype=torch.int64, device="meta")
    data = {c: ListBatches([{"input_ids": ids, "labels": ids}]) for c in range(CLIENTS)}
    e = Experiment(method, Supervised(model), data, rounds=REFRESH + 1, evaluate="none", reply_limit=1 << 40)
    costs, numbers = predict(e).rounds, sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = {}
    for what, number in (("round 1", 1), ("later", 2), ("new P", REFRESH + 1)):
        cost = costs[number - 1]
        found[what] = seen(cost)
        expected = formula(method, numbers, sizes, number == 1, number % REFRESH == 1)
        assert {way: found[what][way] for way in expected} == expected, (name, what, found[what], expected)
    client = costs[1].clients[0]
    return found | {"flops": client.flops / TAU, "peak_memory_bytes": client.peak_memory_bytes}


def seconds(bytes: dict[str, int], flops: float, bps: float) -> tuple[float, float]:
    """Of a client's round: (communication, computation)."""
    profile = Profile(up_bps=bps, down_bps=bps, flops=SPEED)
    computing = profile.seconds(0, TAU * flops, 0)
    return profile.seconds(bytes["down"] + bytes["headers"], TAU * flops, bytes["up"]) - computing, computing


def timed(rows: dict[str, dict[str, Any]]) -> None:
    """Add the seconds of a later round, and the milliseconds of one of its steps, to every row."""
    for found in rows.values():
        for link, bps in LINKS.items():
            sending, computing = seconds(found["later"], found["flops"], bps)
            found[link] = {
                "round_s": round(sending + computing, 2), "communication_ms_per_step": round(1e3 * sending / TAU, 1),
                "computation_ms_per_step": round(1e3 * computing / TAU, 1),
            }  # fmt: skip


def table(rows: dict[str, dict[str, Any]], published: dict[str, tuple[float, float]]) -> str:
    """Rows of Markdown: MB of 10^6 bytes, milliseconds of a step."""
    whole = rows["FedAvg"]["later"]
    heads = ["a client's MB", "up", "down", "of FedAvg", "round 1 down", "new P up", "new P down", "headers, kB"]
    heads += [*(f"{what} at {link}" for link in LINKS for what in ("round s", "ms of a step")), "published ms"]
    lines = [heads, ["---"] * len(heads)]
    for name, found in rows.items():
        later, new = found["later"], found["new P"]
        share = (later["up"] + later["down"]) / (whole["up"] + whole["down"])
        cells = [*(f"{later[way] / 1e6:.2f}" for way in ("up", "down")), f"{share:.1%}"]
        cells += [f"{found['round 1']['down'] / 1e6:.2f}", *(f"{new[way] / 1e6:.2f}" for way in ("up", "down"))]
        cells += [f"{later['headers'] / 1e3:.1f}"]
        for link in LINKS:
            t = found[link]
            parts = f"{t['communication_ms_per_step']} + {t['computation_ms_per_step']}"
            cells += [str(t["round_s"]), parts]
        lines.append([name, *cells, " + ".join(map(str, published.get(name, ())))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--json", action="store_true", help="all figures instead of the table")
    args = parser.parse_args()
    model = empty(args.model)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in matched(model, TARGETS)}
    rows = {name: row(name, method, model, shapes) for name, method in methods().items()}
    timed(rows)
    figures = PUBLISHED if args.model == "llama_60m" else {}
    print(json.dumps({"model": args.model, "rows": rows}, indent=1) if args.json else table(rows, figures))


if __name__ == "__main__":
    main()
