"""The passes of a training step: forward and backward for each micro-batch, and who takes gradients as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lilliput.core.labels import columns, counted, labels
from lilliput.optim.gradients import own
from lilliput.training.autocast import autocast

if TYPE_CHECKING:
    from lilliput.training.step import Trainer

Loss = Callable[[nn.Module, Any, Any], tuple[Tensor, dict[str, Tensor]]]
Part = tuple[Any, int]  # a micro-batch, and how many of its labels count


def micro_batches(batch: Any, pieces: int) -> list[Part]:
    """The batch cut along its examples into at most so many pieces; pieces without a label that counts are left out."""
    cut = [batch]
    if pieces > 1:
        cut = list(zip(*(x.chunk(pieces) for x in columns(batch)), strict=True))
        if isinstance(batch, dict):
            cut = [dict(zip(batch, part, strict=True)) for part in cut]
    return [(part, n) for part in cut if (n := counted(labels(part)))]


class Means:
    """Loss and metrics over micro-batches, weighted by their labels that count."""

    def __init__(self, parts: Sequence[Part], of: float | None):
        self._total = sum(n for _, n in parts) if of is None else of
        self._found: dict[str, Any] = {}

    def share(self, n: int, value: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """A micro-batch's part of the whole batch's mean loss."""
        if n == self._total:
            self._found = {name: x.detach() for name, x in metrics.items()} if metrics else {}
            self._found[""] = value.detach()
            return value
        share = n / self._total
        for name, x in {**metrics, "": value}.items():
            self._found[name] = self._found.get(name, 0.0) + share * x.detach()
        return value * share

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self._found.pop(""), self._found


def backward(
    model: nn.Module, opt: Trainer, loss: Loss, parts: Sequence[Part], context: Any, of: float | None
) -> Means:
    """The backward passes of a step: the gradients of the mean loss, times fp16's scale, come into `.grad`."""
    means, left = Means(parts, of), len(parts)
    for batch, n in parts:
        with autocast(opt.device, opt.config.precision):
            value, metrics = loss(model, batch, context)
        value, left = means.share(n, value, metrics), left - 1
        if opt.hooks is not None:
            opt.hooks.begin(left)
        if opt.params:
            check_learns(value)
            torch.autograd.backward(value if opt.scaler is None else opt.scaler.scale(value), inputs=opt.inputs)
        if left:
            separate(opt.params)
    if opt.hooks is not None:
        opt.hooks.complete()
    return means


def check_learns(loss: Tensor) -> None:
    """Raise ValueError for a loss that depends on nothing that has a gradient."""
    if not loss.requires_grad:
        raise ValueError(
            "the loss depends on no trained parameter, so that there is nothing to learn from it; look for detach(), "
            "no_grad() or argmax on the way, and for frozen layers"
        )


def separate(params: Sequence[Tensor]) -> None:
    """Let no two gradients lie in one memory, where torch would add to both what comes for one."""
    for p in params:
        if p.grad is not None:
            p.grad = own(p.grad)


def drop(params: Sequence[Tensor]) -> None:
    """Free the gradients, whatever became of the step."""
    for p in params:
        p.grad = None


class Hooks(Protocol):
    """Takes gradients as they come in the backward passes of a step: to apply them, or to sum them over processes."""

    def begin(self, left: int) -> None:
        """A pass begins, and so many of its step come after it."""

    def complete(self) -> None:
        """The last pass is over: do what it has left."""


class PerLayer:
    """Hooks that apply each gradient in a step's last backward pass, as soon as it is there."""

    def __init__(self, opt: Trainer):
        self._opt, self._left = opt, 0
        self._waiting = set(opt.everything)
        # Not in `.grad`, where torch's optimizers would find the gradients of other parameters.
        self._sums: dict[int, Tensor] = {}

    def begin(self, left: int) -> None:
        self._left = left

    def arrived(self, i: int, p: Tensor) -> None:
        grad, p.grad = p.grad, None
        assert grad is not None
        if i in self._sums:
            grad = self._sums.pop(i).add_(grad)
        if not self._left:
            self._waiting.discard(i)
            self._opt.apply([i], [grad])
        else:
            self._sums[i] = own(grad)

    def complete(self) -> None:
        """Apply what the last pass did not reach."""
        for i in sorted(self._waiting):
            self._opt.apply([i], [self._sums.pop(i, None)])
        self._waiting = set(self._opt.everything)


@contextmanager
def updating(opt: Trainer) -> Iterator[None]:
    """Hooks for updates in the backward pass, where the settings want them and nothing else makes them."""
    if not opt.config.per_layer or opt.hooks is not None:
        yield
        return
    opt.hooks = hooks = PerLayer(opt)
    with ExitStack() as stack:
        stack.callback(setattr, opt, "hooks", None)
        for i, p in enumerate(opt.params):
            stack.callback(p.register_post_accumulate_grad_hook(partial(hooks.arrived, i)).remove)
        yield
