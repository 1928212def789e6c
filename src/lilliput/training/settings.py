"""How a client trains: the settings that every federated method has, and learning-rate schedules over rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from lilliput.training.updates import check


@dataclass(frozen=True)
class Training:
    """How a client trains; every federated method has these fields.

    lr:            learning rate of the first round (after a warm-up); `schedule` scales it over rounds.
    optimizer:     sgd, adam, adamw, or any torch.optim.Optimizer class; `optimizer_options` go to it.
    local_epochs:  passes over the client's data per round; `local_steps`, if given, counts steps instead.
    schedule:      constant, cosine, linear, exponential:GAMMA or multistep:ROUND,ROUND,...:GAMMA.
    warmup:        rounds in which lr rises to its first value, or, below 1, their share of all; the schedule follows.
    clip:          the largest norm of a step's gradient (of each parameter's with per_layer).
    accumulate:    micro-batches that each batch is cut into, to save memory.
    precision:     float32, bf16 (autocast) or fp16 (autocast with loss scaling).
    checkpointing: recompute each block's activations in the backward pass instead of keeping them.
    per_layer:     update each parameter in a backward hook.
    optimizer_state: what a client's optimizer knows at the start of a round: nothing (reset), what it had (keep), or
                   the mean subspace of the round before (average, for subspace optimizers).
    buffers:       BatchNorm statistics are averaged over clients, stay local, or are not used at all (none).
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    optimizer: Any = "sgd"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    local_epochs: int = 1
    local_steps: int | None = None
    schedule: str = "constant"
    warmup: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    checkpointing: bool = False
    per_layer: bool = False
    optimizer_state: Literal["reset", "keep", "average"] = "reset"
    buffers: Literal["average", "local", "none"] = "average"

    def __post_init__(self) -> None:
        _positive(self, "lr", "accumulate", "clip")
        _among(self, precision=("float32", "bf16", "fp16"), optimizer_state=("reset", "keep", "average"))
        _among(self, buffers=("average", "local", "none"))
        for name in ("momentum", "weight_decay", "local_epochs", "local_steps", "warmup"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov without momentum would do nothing; set momentum > 0")
        if self.per_layer and self.precision == "fp16":
            raise ValueError("per_layer cannot undo a step whose fp16 loss scale overflowed; use precision=bf16")
        factor(self.schedule, 1, 1)
        check(
            self.optimizer, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov,
            options=self.optimizer_options,
        )  # fmt: skip

    def lr_at(self, round: int, rounds: int) -> float:
        """The learning rate of a round, from 1, of a run of `rounds`."""
        return self.lr * self.factor_at(round, rounds)

    def factor_at(self, round: int, rounds: int) -> float:
        """What learning rates are multiplied by in a round, from 1, of a run of `rounds`."""
        return factor(self.schedule, round, rounds, self.warmup)


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")


def _among(config: Any, **allowed: tuple[str, ...]) -> None:
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(f"{name} is {getattr(config, name)!r}; choose one of {', '.join(values)}")


def warmup_rounds(warmup: float, rounds: int) -> int:
    """Rounds (or steps) of a warm-up that is a number of them, or, below 1, a share of all to the nearest number."""
    return int(warmup) if warmup >= 1 else round(warmup * rounds)


def factor(schedule: str, round: int, rounds: int, warmup: float = 0.0) -> float:
    """What the learning rate is multiplied by in a round (from 1) of a run of `rounds`.

    Over `warmup` rounds it rises in even steps to what the schedule begins with in the round after them.
    """
    round = int(round)  # for whoever watches what a round's number decides: not what travels
    rise = warmup_rounds(warmup, rounds)
    return min(1.0, round / (rise + 1)) * _scheduled(schedule, round, max(round - rise, 1), max(rounds - rise, 1))


def _scheduled(schedule: str, round: int, number: int, of: int) -> float:
    """The factor of a round, the `number`th from the beginning of the schedule `of` so many."""
    name, *arguments = schedule.split(":")
    done = (number - 1) / of
    try:
        if name == "constant" and not arguments:
            return 1.0
        if name in ("cosine", "linear") and not arguments:
            return fallen(name, done)
        if name == "exponential":
            return float(arguments[0]) ** (number - 1)
        if name == "multistep":
            return float(arguments[1]) ** sum(round > int(milestone) for milestone in arguments[0].split(","))
    except (ValueError, IndexError):
        pass
    raise ValueError(
        f"schedule {schedule!r} is not one of constant, cosine, linear, exponential:GAMMA, multistep:ROUND,ROUND:GAMMA"
    )


def fallen(name: str, done: float, end: float = 0.0) -> float:
    """Where a cosine or a line from 1 down to `end` is after this share of its way."""
    return end + (1.0 - end) * (0.5 * (1.0 + math.cos(math.pi * done)) if name == "cosine" else 1.0 - done)


def check_step(batch_size: int, accumulate: int, dtype: str, precision: str) -> None:
    """Raise ValueError for a batch that does not divide into its passes, and for bf16 asked for twice."""
    if batch_size % accumulate:
        raise ValueError(
            f"batch_size={batch_size} does not divide into accumulate={accumulate} passes; choose multiples"
        )
    if dtype == precision == "bf16":
        raise ValueError("precision=bf16 does nothing to bf16 weights; leave it out, or set dtype=float32")
