"""`lilliput demo`: twenty devices, half of them too small for the model, and only the small ones have seen digits 5-9.

Scikit-learn's handwritten digits, a CNN of 154,634 parameters, real training and measured costs.  Every way of training
is one row of `WAYS`: a method that fits the model to the small devices joins by adding its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import data, models
from lilliput.algorithms import Centralized, FedAvg, FedSub, FslSage, LocalOnly, SplitFedV1
from lilliput.cli.compare import parsed
from lilliput.core import random
from lilliput.core.fleet import Profile
from lilliput.experiment.experiment import Experiment
from lilliput.experiment.stop import Row
from lilliput.report.text import duration
from lilliput.splitter import Split
from lilliput.tasks import Supervised, accuracy

DEVICES, LARGE = 20, range(10)  # devices 0-9 can hold the model, 10-19 cannot
EARLY, LATE = range(5), range(5, 10)  # the digits that the large and the small devices have seen
LEAK = 0.02  # of each digit, what the other half has seen too
MEMORY = {True: 4_000_000, False: 2_000_000}  # bytes of a large and of a small device
TRAINING: dict[str, Any] = {"lr": 0.2, "schedule": "cosine", "local_epochs": 1}
BATCH, ROUNDS = 16, 40
CUT = "conv2"  # where the server's part begins, for methods that split the model
RANK = 1 / 8  # of each layer's width, for methods that train in a subspace
# A step in the subspace has that share of the gradient's energy, and a rate that makes up for it.
SUBSPACE: dict[str, Any] = {**TRAINING, "lr": TRAINING["lr"] / RANK, "rank": RANK}
SAGE: dict[str, Any] = {"server_update_interval": 1, "align_epochs": 10, "align_batch_size": 25, "auxiliary_lr": 0.01}


@dataclass(frozen=True)
class Way:
    """One way to train: a method, the share of the model's width that it trains, and which devices take part.

    `promised` lifts the limits of memory: what could be if every device could hold the model.  If the model is `split`,
    every device trains what comes before CUT, and a server the rest.
    """

    name: str
    algorithm: Any
    width: float = 1.0
    devices: Sequence[int] = range(DEVICES)
    promised: bool = False
    split: bool = False


WAYS = (
    Way("FedAvg if all could hold it", FedAvg(**TRAINING), promised=True),
    Way("FedAvg over those that can", FedAvg(**TRAINING), devices=LARGE),
    Way("FedAvg at half width", FedAvg(**TRAINING), width=0.5),
    Way("FedSub, rank 1/8", FedSub(**SUBSPACE)),
    Way("SplitFed, cut after conv1", SplitFedV1(**TRAINING), split=True),
    Way("FSL-SAGE, cut after conv1", FslSage(**TRAINING, **SAGE, order="interleaved"), split=True),
    Way("each alone, at half width", LocalOnly(**TRAINING), width=0.5),
    Way("all data in one place", Centralized(**TRAINING), promised=True),
)


@dataclass(frozen=True)
class Outcome:
    """What a way reached, and what took part in it: devices, and the share of all training data that they hold."""

    way: Way
    rows: list[Row]
    devices: int
    share: float

    @property
    def last(self) -> Row:
        return self.rows[-1]


def parts(dataset: data.Dataset, seed: int) -> dict[int, list[int]]:
    """Indices by device: each digit is dealt to its half of the devices, but for the leak, dealt to the other."""
    held: dict[int, list[int]] = {device: [] for device in range(DEVICES)}
    halves = (list(LARGE), [device for device in held if device not in LARGE])
    for digit in (*EARLY, *LATE):
        index = (dataset.train[1] == digit).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=random.generator("demo", seed, digit))]
        leak = round(LEAK * len(index))
        home, other = halves if digit in EARLY else halves[::-1]
        for half, some in ((other, index[:leak]), (home, index[leak:])):
            for place, i in enumerate(some.tolist(), 3 * digit):  # each digit starts elsewhere, so that sizes stay even
                held[half[place % len(half)]].append(i)
    return held


def model(dataset: data.Dataset, width: float, seed: int) -> nn.Module:
    """The CNN at a share of its width, the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.key("demo", seed) % 2**32)
        channels, hidden = [round(width * c) for c in (32, 64)], round(width * 384)
        return models.build("cnn", shape=dataset.shape, classes=dataset.classes, channels=channels, hidden=hidden)


def task(way: Way, dataset: data.Dataset, seed: int) -> Supervised:
    """The model that a way trains; a split one has a linear head that stands in for the server's part."""
    network = model(dataset, way.width, seed)
    if not way.split:
        return Supervised(network, metrics=METRICS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.key("demo head", seed) % 2**32)
        head = nn.Sequential(nn.Flatten(), nn.Linear(32 * 4 * 4, dataset.classes))
    return Split.of(network, CUT, auxiliary=head, metrics=METRICS, example=torch.rand(2, *dataset.shape))


def among(digits: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """The accuracy on some digits.  The whole test set is one batch, so that means over batches are means."""

    def metric(logits: Tensor, labels: Tensor) -> Tensor:
        chosen = torch.isin(labels, torch.tensor(digits, device=labels.device))
        return accuracy(logits[chosen], labels[chosen])

    return metric


def worst(logits: Tensor, labels: Tensor) -> Tensor:
    """The accuracy on the digit that is told worst."""
    return torch.stack([among([digit])(logits, labels) for digit in (*EARLY, *LATE)]).min()


METRICS = {"accuracy": accuracy, "0-4": among(EARLY), "5-9": among(LATE), "worst": worst}


def train(way: Way, dataset: data.Dataset, held: data.Federated, rounds: int, seed: int) -> Outcome:
    """Train in one way.  A device whose memory does not hold what it is asked to train is refused by the engine."""
    memory = {c: MEMORY[way.promised or c in LARGE] for c in way.devices}
    experiment = Experiment(
        algorithm=way.algorithm,
        task=task(way, dataset, seed),
        data={c: held.train[c] for c in way.devices},
        rounds=rounds,
        seed=seed,
        test=held.test,
        profiles={c: Profile(memory_bytes=limit) for c, limit in memory.items()},
    )
    history = experiment.run("auto")
    examples = sum(len(held.partition[c]) for c in way.devices)
    return Outcome(way, history.rows, len(way.devices), examples / len(dataset.train[0]))


def table(outcomes: Sequence[Outcome]) -> Any:
    """Who took part, what was learned and what it cost; accuracies in per cent."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    shown.add_column("", no_wrap=True)
    titles = ("devices\n(data)", "all", "0-4", "5-9", "worst\ndigit", "peak\nMB", "MB\nsent", "simu-\nlated")
    for title in titles:
        shown.add_column(title, justify="right", vertical="bottom", no_wrap=True)
    for outcome in outcomes:
        scores = [f"{100 * outcome.last[name]:.0f}" for name in METRICS]
        took_part = f"{outcome.devices} ({100 * outcome.share:.0f}%)"
        shown.add_row(outcome.way.name, took_part, *scores, *costs(outcome))
    return shown


def costs(outcome: Outcome) -> tuple[str, str, str]:
    """Memory of the largest client, MB sent both ways, simulated time; data brought together send themselves."""
    rows = outcome.rows
    memory = f"{max(row['peak_memory_bytes'] for row in rows) / 1e6:.2f}"
    if isinstance(outcome.way.algorithm, Centralized):
        return memory, "-", "-"
    sent = sum(row["up_bytes"] + row["down_bytes"] for row in rows) / 1e6
    return memory, f"{sent:.0f}", duration(sum(row["simulated_seconds"] for row in rows))


def main(argv: Sequence[str]) -> int:
    """Train in every way, print the table and draw the picture."""
    options = parsed(parser(), argv or ["--rounds", str(ROUNDS)])
    if options is None:
        return 0
    if options.rounds < 1:
        raise ValueError(f"rounds is {options.rounds}; it must be at least 1")
    from rich.console import Console

    console = Console(highlight=False)
    dataset = data.load("digits")
    held = data.federate(dataset, parts(dataset, options.seed), batch_size=BATCH)
    size = sum(p.numel() for p in model(dataset, 1.0, options.seed).parameters())
    examples, memory = len(dataset.train[0]), MEMORY[False] / 1e6
    console.print(
        f"Twenty devices hold {examples:,} handwritten digits.  Half of them have {memory:g} MB\n"
        f"of memory, too little to train a CNN of {size:,} parameters, and only they\n"
        f"have seen the digits 5 to 9, but for {100 * LEAK:g} %.  {options.rounds} rounds each way:\n",
        soft_wrap=True,
    )
    outcomes = []
    for way in WAYS:
        console.print(f"  {way.name:<30}", end="")
        started = time.perf_counter()
        outcomes.append(train(way, dataset, held, options.rounds, options.seed))
        console.print(f"{duration(time.perf_counter() - started):>8}")
    console.print("\nAccuracy in per cent on the test digits, and what it cost:\n")
    console.print(table(outcomes))
    console.print()
    for path in _draw(dataset, held, outcomes, options.folder):
        console.print(f"picture: {path}", soft_wrap=True)
    return 0


def _draw(dataset: data.Dataset, held: data.Federated, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    from lilliput.cli import demo_picture

    return demo_picture.draw(dataset, held, outcomes, LARGE, folder)


def parser() -> argparse.ArgumentParser:
    """What the command understands."""
    made = argparse.ArgumentParser(
        "lilliput demo",
        description="Twenty devices, half of them too small for the model: a table and a picture of what each way of "
        "training makes of them.",
        exit_on_error=False,
    )
    made.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of each way of training ({ROUNDS})")
    made.add_argument("--seed", type=int, default=0, help="of the weights and of who has which digit (0)")
    made.add_argument("--folder", type=Path, default=Path("demo"), help="where the picture goes (demo)")
    return made
