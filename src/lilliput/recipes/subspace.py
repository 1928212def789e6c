"""FedSub and its baselines (Zhang, Xu, Yuan, 2025, https://arxiv.org/abs/2509.05213), at equal steps and equal bytes.

The settings are those of the published program's scripts.  The program compares methods at equal steps and counts only
the layers in subspaces, because it never averages the other parameters; here they are averaged and counted.  At equal
bytes, FedAvg, P = I and data-parallel SGD (FedAvg with one local step) have as many rounds as FedSub's bytes pay for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lilliput.models import LLAMA
from lilliput.recipes.recipe import Case, Recipe, Version
from lilliput.recipes.traffic import Network, llama, resnet

# The closed forms assume that the other parameters are averaged, and that a device keeps the model between rounds.
FEDSUB = {"projection": "cd", "dual": "rotated", "ordinary": "average", "downlink": "means"}
HARDWARE = "one GPU at 100 TFLOP/s, by arithmetic"


@dataclass(frozen=True)
class Schedule:
    """FedSub's rounds, the local steps of a round, clients, and the rows of results of a run."""

    rounds: int
    tau: int
    clients: int = 2
    results: int = 20

    def of(self, rounds: int, tau: int | None = None) -> dict[str, Any]:
        """The settings of a run of `rounds`."""
        return {"rounds": rounds, "local_steps": tau or self.tau, "evaluate_every": max(1, rounds // self.results)}


def cases(
    network: Network, schedule: Schedule, subspaces: Mapping[str, Mapping[str, Any]], **common: Any
) -> list[Case]:
    """FedSub in each of `subspaces` and its baselines, at equal steps and at the bytes of each.

    subspaces: name -> its own settings of `fedsub.`; common: those of all.
    """
    common = {**FEDSUB, **common}
    full = {"rank": 1.0, "projection": "idx"}
    made = [_subspace(f"FedSub, {name}", network, schedule, {**common, **own}) for name, own in subspaces.items()]
    made += _baselines(network, schedule, {**common, **full}, "", schedule.rounds, schedule.rounds)
    ranks = {own["rank"]: name for name, own in reversed([*subspaces.items()])}
    for rank, name in sorted(ranks.items()):
        paid = [network.paid(rank, schedule.rounds, whole_models=n) for n in (0, 1)]
        at = " at its bytes" if len(ranks) == 1 else f" at the bytes of {name}"
        made += _baselines(network, schedule, {**common, **full}, at, *paid)
    return made


def _subspace(
    name: str, network: Network, schedule: Schedule, own: Mapping[str, Any], rounds: int | None = None
) -> Case:
    settings = {"algorithm": "fedsub", **{f"fedsub.{key}": value for key, value in own.items()}}
    mib = _mib(network.sent(own["rank"]), schedule)
    return Case(name, {**settings, **schedule.of(rounds or schedule.rounds)}, mib=mib)


def _baselines(
    network: Network, schedule: Schedule, identity: Mapping[str, Any], at: str, rounds: int, identity_rounds: int
) -> list[Case]:
    """P = I, FedAvg and data-parallel SGD: at equal steps, or `at` equal bytes."""
    steps = rounds if at else rounds * schedule.tau
    mib = _mib(network.whole + network.buffers, schedule)
    return [
        _subspace(f"P = I{at}", network, schedule, identity, identity_rounds),
        Case(f"FedAvg{at}", {"algorithm": "fedavg", **schedule.of(rounds)}, mib=mib),
        Case(f"Data-parallel SGD{at}", {"algorithm": "fedavg", **schedule.of(steps, 1)}, mib=mib),
    ]


def _mib(numbers: int, schedule: Schedule) -> float:
    """MiB that all clients send and receive in a round."""
    return round(2 * 4 * numbers * schedule.clients / 2**20, 2)


def _hours(made: Sequence[Case], operations: float, speed: float = 1e14) -> float:
    """Hours of all cases, given the operations that all clients do in a step."""
    steps = sum(case.settings["rounds"] * case.settings["local_steps"] for case in made)
    return round(steps * operations / speed / 3600, 1)


def _small(made: Sequence[Case], settings: Mapping[str, Any]) -> Version:
    """Each case at a small size; it has no MiB, because the traffic of so small a model means nothing."""
    return Version([replace(case, mib=None) for case in made], "2 CPU cores", 0.01, settings)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON: dict[str, Any] = {
    "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "evaluate": "server",
    "cohort": None, "seed": 42,
}  # fmt: skip
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
# Rounds of two steps of a LLaMA of one layer on bytes of the standard library, to see that everything runs.
SMALL = {
    "model": "llama_9m", "model.layers": 1, "model.hidden": 32, "model.mlp": 64, "model.heads": 2, "dataset": "corpus",
    "corpus.source": "stdlib", "corpus.tokenizer": "bytes", "corpus.length": 32, "corpus.tokens": "20K",
    "corpus.validation_tokens": "4K", "batch_size": 4, "lr": 0.1,
}  # fmt: skip
BYTES = 259  # tokens of the tokenizer `bytes`
T5 = 32_100  # tokens of T5's tokenizer: its pieces and a hundred sentinels


def _pretraining(size: str) -> Recipe:
    """LLaMA on C4 with two clients, 20,000 steps."""
    schedule, small = Schedule(2000, tau=10), Schedule(4, tau=2, results=1)
    network, batch, length = llama(LLAMA[size], T5), 64, 1024
    common = {"targets": TARGETS, "refresh": 5}
    made = cases(network, schedule, {f"rank {r}": {"rank": r} for r in (64, 128, 256)}, **common)
    few = cases(llama(TINY, BYTES), small, {f"rank {r}": {"rank": r} for r in (4, 8, 16)}, **{**common, "refresh": 1})
    # A document of C4 has 427 of T5's tokens on average, and each document is one sequence.
    tokens = schedule.rounds * schedule.tau * schedule.clients * batch * 427
    settings = {
        **COMMON, "model": f"llama_{size}", "model.lean": True, "dataset": "corpus", "corpus.packing": False,
        "corpus.validation_tokens": "1M", "partition": "iid", "clients": schedule.clients, "batch_size": batch,
        "lr": 1e-3, "precision": "bf16", "checkpointing": True, "rounds": schedule.rounds,
        "local_steps": schedule.tau,
    }  # fmt: skip
    c4 = {"corpus.source": "c4", "corpus.tokenizer": "t5-base", "corpus.length": length, "corpus.tokens": tokens}
    operations = 8 * network.whole * schedule.clients * batch * length
    return Recipe(
        f"fedsub/llama_{size}", f"FedSub and its baselines, LLaMA-{size.upper()} on C4, 2 clients, 20,000 steps",
        "FedSub's script; perplexities were not published", settings,
        {"full": Version(made, HARDWARE, _hours(made, operations), c4),
         "small": _small(few, SMALL)},
        metric="perplexity", note=_note(size, made),
    )  # fmt: skip


def _note(size: str, made: Sequence[Case]) -> str:
    """The note: FedAvg's rounds at equal bytes, and the published numbers."""
    paid = [str(case.settings["rounds"]) for case in made if case.name.startswith("FedAvg at")]
    ours = (
        f"At the bytes of ranks 64, 128 and 256, FedAvg has {', '.join(paid[:-1])} and {paid[-1]} of the 2000 rounds."
    )
    peak = {
        "60m": "91.3, 92.4, 94.5 and 100.9 % at these ranks and P = I",
        "350m": "82.7, 84.0, 86.7 and 107.5 % at these ranks and P = I", "1b": "90.5, 91.6 and 93.7 % at these ranks",
    }  # fmt: skip
    time = (
        ", and the time of a round at 100 Mb/s (76.1, 77.8, 80.1 and 86.5 %), of which communication is 12, 17, 23 and "
        "41 % of FedAvg's, because the other parameters were not averaged" if size == "60m" else ""
    )  # fmt: skip
    published = f"The source reports the peak memory relative to FedAvg's ({peak[size]}){time}"
    return (
        f"{ours}  {published}.  The program scales gradients of b by rank / rows and keeps the first P; ours does not."
    )


def _finetuning() -> Recipe:
    """LLaMA-3.2-1B on WikiText-2: one pass over all text, about 300 batches, in rounds of five steps."""
    schedule, small = Schedule(60, tau=5), Schedule(4, tau=2, results=1)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    network, batch, length = llama(sizes, 128_256, key_rows=512, tables=1), 16, 512
    common = {"targets": TARGETS, "refresh": 10}
    made = cases(network, schedule, {"rank 0.7": {"rank": 0.7}}, **common)
    few = cases(llama(TINY, BYTES), small, {"rank 0.7": {"rank": 0.7}}, **{**common, "refresh": 1})
    settings = {
        **COMMON, "model": "pretrained", "model.lean": True, "dataset": "wikitext2", "partition": "iid",
        "clients": schedule.clients, "batch_size": batch, "lr": 1e-4, "precision": "bf16", "checkpointing": True,
        "rounds": schedule.rounds, "local_steps": schedule.tau,
    }  # fmt: skip
    source = "meta-llama/Llama-3.2-1B"
    own = {"pretrained.source": source, "wikitext2.tokenizer": source, "wikitext2.length": length}
    return Recipe(
        "fedsub/llama_wikitext2", "FedSub and its baselines, LLaMA-3.2-1B fine-tuned on WikiText-2, 2 clients",
        "FedSub's script; its numbers were not published", settings,
        {"full": Version(made, HARDWARE, _hours(made, 8 * network.whole * schedule.clients * batch * length), own),
         "small": _small(few, SMALL)},
        metric="perplexity",
        note="Rows have loss, accuracy of tokens and perplexity.  pretrained.source and wikitext2.tokenizer name the "
             "model's folder, wikitext2.folder the data's.  We use the model's own tokenizer; the program used T5's, "
             "and gave each client all of the text.",
    )  # fmt: skip


def _vision() -> Recipe:
    """ResNet-110 of 7 x 7 kernels on CIFAR-100, a block of 25 classes per client: 47 epochs of 391 batches."""
    epochs, batches, batch = 47, -(-12_500 // 32), 32
    schedule = Schedule(round(epochs * batches / 10), tau=10, clients=4)
    small = Schedule(4, tau=2, clients=4, results=1)
    network = resnet(18, 16, 7, 3, 100)
    subspaces = {f"{dual} dual": {"rank": 3, "dual": dual} for dual in ("rotated", "full")}
    common = {"targets": ["conv1", "conv2"], "along": "width", "refresh": 1}
    made = cases(network, schedule, subspaces, **common)
    few = cases(resnet(3, 4, 7, 1, 10), small, subspaces, **common)
    settings = {
        **COMMON, "model": "resnet110", "model.kernel": 7, "dataset": "cifar100", "partition": "class_blocks",
        "clients": 4, "batch_size": batch, "lr": 0.1, "augment": ["crop:4", "flip"], "rounds": schedule.rounds,
        "local_steps": schedule.tau,
    }  # fmt: skip
    digits = {"model": "resnet20", "model.width": 4, "dataset": "digits", "augment": None, "batch_size": 8}
    # Three passes of two operations; a weight acts at each of 32 x 32, 16 x 16 or 8 x 8 pixels.
    pixels = 37 * 16 * 16 * 1024 + 36 * (32 * 32 * 256 + 64 * 64 * 64)
    operations = 6 * 49 * pixels * schedule.clients * batch
    fedavg = next(case.settings["rounds"] for case in made if case.name == "FedAvg at its bytes")
    return Recipe(
        "fedsub/resnet110_cifar100", "FedSub and its baselines, ResNet-110 of 7 x 7 kernels on CIFAR-100, 4 clients",
        "FedSub's script; its numbers were not available", settings,
        {"full": Version(made, "one GPU at 10 TFLOP/s, by arithmetic", _hours(made, operations, 1e13)),
         "small": _small(few, digits)},
        note=f"FedSub has {epochs} epochs; its bytes pay for {fedavg} rounds of FedAvg, which are "
             f"{fedavg * 10 / batches:.1f} epochs (20 in the script, which counts only convolutions).  The program "
             "tests each client on its own classes; we test on all.",
    )  # fmt: skip


SUBSPACE = (*(_pretraining(size) for size in ("60m", "350m", "1b")), _finetuning(), _vision())
