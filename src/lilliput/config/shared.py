"""The settings that every run has, whatever its method, model or data: the top level of the configuration.

How clients train (`lr`, `momentum`, `local_epochs`, `cohort`, ...) stands at the top level too, but comes from the
methods' own dataclasses: the fields that all of ours have.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from lilliput.config.fields import Field, fields_of


@dataclass(frozen=True)
class Shared:
    """Top-level settings with their defaults; the comments are what `lilliput run --help` says."""

    algorithm: str = "fedavg"  # the federated method
    slice: str | None = None  # which part of the model each client holds; the method's own by default
    combine: str | None = None  # how the clients' changes become one; the method's own by default
    codec: str | None = None  # how messages are made smaller; some kinds only, several: int8:activations+bf16
    model: str = "auto"  # the network; auto suits the data set
    dataset: str = "digits"  # the data set
    partition: str = "auto"  # how the data lies on the clients; auto is the data set's own clients, else iid
    loss: str = "cross_entropy"  # what training minimises
    clients: int | None = None  # how many devices there are; 10, or as many as the data set has
    rounds: int = 20  # communication rounds
    batch_size: int = 32  # examples per step
    augment: str | list[str] | None = "auto"  # what training images go through: [crop:4, flip, cutout:16], or null
    seed: int = 0  # decides every draw of the run
    engine: str = "auto"  # where the clients run: auto, sequential or workers; dry only tells the cost
    device: str = "auto"  # cpu, cuda, cuda:0,1 or mps; auto takes a GPU where there is one
    init: str | None = None  # weights to start from: a run's folder, or a .safetensors, .pt, .pth or .th file
    evaluate: Literal["server", "clients", "both", "none"] = "server"  # where models are tested
    evaluate_every: int = 1  # rounds between evaluations
    test_fraction: float = 0.0  # share of each client's data that it keeps for testing
    target: str | float | None = None  # stop when reached: 0.9 (accuracy) or 'loss<=0.5'
    comm_threshold_mb: float | None = None  # stop when so many MB were sent, up and down together
    seconds: float | None = None  # stop after so many seconds
    patience: int | None = None  # stop after so many evaluations without a better value
    quorum: float = 0.5  # share of a round's clients that must answer
    timeout: float | None = None  # seconds that a client may take
    profiles: str | None = None  # a YAML or JSON file of what each device has; `device_profile` is for all alike
    profile: Literal["none", "comm", "all"] = "none"  # split the time into encode, transfer, decode, compute and wait
    recipe: str | None = None  # start from a published experiment's settings
    scale: str = "full"  # which version of the recipe
    case: str | None = None  # which row of the recipe's table; all of them by default
    name: str | None = None  # the run's folder below `folder`; else <algorithm>/<model>/<dataset>-<partition>/<time>
    folder: str = "runs"  # where runs are kept
    checkpoint_every: int | None = None  # rounds between checkpoints; by default as often as they are cheap
    plots: bool = True  # draw figures at the end, where matplotlib is installed
    tensorboard: bool = True  # write TensorBoard events, where tensorboard is installed
    wandb: bool = False  # report to Weights & Biases


# What tells neither two experiments apart nor changes a number.
NEUTRAL = frozenset({"name", "folder", "recipe", "scale", "case", "checkpoint_every", "plots", "tensorboard", "wandb"})

# What may change when a run goes on: where it runs, how long, what is measured and what is written of it.
LATER = NEUTRAL | {
    "engine", "device", "rounds", "evaluate", "evaluate_every", "target", "comm_threshold_mb", "seconds", "patience",
    "quorum", "timeout", "profile",
}  # fmt: skip


@functools.lru_cache(maxsize=1)
def training() -> Mapping[str, Field]:
    """The settings of local training: the plain fields that all of our methods have, with FedAvg's defaults."""
    from lilliput.algorithms import ALGORITHMS, FedAvg

    common = set.intersection(*(set(fields_of(method)) for method in ALGORITHMS.values()))
    return {name: f for name, f in fields_of(FedAvg).items() if name in common and name not in ("slice", "combine")}


@functools.lru_cache(maxsize=1)
def top() -> Mapping[str, Field]:
    """Every top-level setting, in the order that help shows."""
    own = fields_of(Shared)
    names = [f.name for f in fields(Shared)]
    cut = names.index("batch_size")
    ordered = {name: own[name] for name in names[:cut]} | dict(training()) | {name: own[name] for name in names[cut:]}
    # A cohort may be a share of the clients, whose number only the data may know.
    return ordered | {"cohort": Field("cohort", int | float | None, None)}
