"""Each parameter updated in the backward pass as soon as its gradient is there: one dense gradient lives at a time.

    layers = per_layer(optimizer, accumulate=4)
    for batch in batches:                       # every fourth backward pass steps
        (loss(batch) / 4).backward()

Over micro-batches, gradients of projected matrices accumulate in the subspace.  They accumulate in full where the whole
gradient is needed: when a new subspace is due, under online PCA, and for what is not projected.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lilliput.lean.policy import fast
from lilliput.optim import subspace
from lilliput.optim.driver import SubspaceOptimizer, Work
from lilliput.optim.options import ranked
from lilliput.optim.states import working_dtype

CLIPS = ("parameter", "global")


class PerLayer:
    """The hooks on an optimizer's parameters.  `optimizer.step()` then finds no gradients and does nothing."""

    def __init__(
        self, optimizer: SubspaceOptimizer, accumulate: int = 1, clip: float | None = None, by: str = "parameter"
    ):
        _check(accumulate, clip, by)
        self.optimizer, self.accumulate, self.clip, self.by = optimizer, accumulate, clip, by
        self._seen: dict[Tensor, int] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._norm2: list[Tensor] | None = None
        self._factor: Tensor | None = None
        self._clipped: set[Tensor] = set()  # parameters that the measured norm has served
        self._handles = [
            p.register_post_accumulate_grad_hook(self._hook(number))
            for number, group in enumerate(optimizer.param_groups)
            for p in group["params"]
        ]

    def remove(self) -> None:
        """Take the hooks off; a half-accumulated step is lost."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._sums = [], {}, {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A first backward pass that only measures the norm of all gradients, for the next one to be clipped by."""
        self._norm2, self._factor, self._clipped = [], None, set()
        try:
            yield
        finally:
            squares, self._norm2 = self._norm2, None
        if self.clip is not None and squares:
            self._factor = _clip_factor(torch.stack(squares).sum().sqrt(), self.clip)

    def _hook(self, number: int) -> Any:
        @torch.no_grad()
        def hook(p: Tensor) -> None:
            group = self.optimizer.param_groups[number]  # load_state_dict replaces them
            if self._norm2 is not None:
                self._norm2.append(torch.linalg.vector_norm(p.grad, dtype=working_dtype(p.dtype)).square())
                p.grad = None
                return
            with fast(p.device):
                self._arrived(p, group)

        return hook

    def _arrived(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        self._seen[p] = self._seen.get(p, 0) + 1
        last = self._seen[p] == self.accumulate
        if self.accumulate > 1 and self._compresses(p, group):
            work = self.optimizer.prepare(p, p.grad, group)
            self._sums[p] = work.R + self._sums[p] if p in self._sums else work.R
            p.grad = None
            if last:
                work.G, work.R = None, self._sums.pop(p)
                work.probe = work.R.sum()
                self._finish(work, group)
        elif last:
            self._step(p, p.grad, group)
            p.grad = None
        if last:
            self._seen[p] = 0

    def _compresses(self, p: Tensor, group: dict[str, Any]) -> bool:
        if not ranked(group) or group["update"] != "project" or subspace.learns(group):
            return False
        return p in self._sums or not subspace.due(self.optimizer.ready(p, group), group)

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if self.by == "global" and self.clip is not None:
            if self._factor is None or p in self._clipped:
                raise RuntimeError("global clipping needs the norm of all gradients first: before each step, run a "
                                   "backward pass inside `with layers.measuring():`")  # fmt: skip
            self._clipped.add(p)
            grad.mul_(self._factor)
        if ranked(group):
            self._finish(self.optimizer.prepare(p, grad, group), group)
            return
        if self.clip is not None and self.by == "parameter":
            grad.mul_(_clip_factor(torch.linalg.vector_norm(grad), self.clip))
        self.optimizer.update([p], [grad], group)

    def _finish(self, work: Work, group: dict[str, Any]) -> None:
        if self.clip is not None and self.by == "parameter":
            # The norm of what is applied: the gradient as the subspace sees it, whether it accumulated there or not.
            factor = _clip_factor(torch.linalg.vector_norm(work.R), self.clip)
            work.R.mul_(factor)
            if work.G is not None:
                work.G.mul_(factor)
            work.probe = work.probe * (factor.square() if subspace.learns(group) else factor)
        self.optimizer.finish([work], group)


def per_layer(
    optimizer: SubspaceOptimizer, accumulate: int = 1, clip: float | None = None, by: str = "parameter"
) -> PerLayer:
    """Update parameters in the backward pass.

    accumulate: backward passes per step; divide each loss by it, as usual.
    clip: the largest norm of each parameter's gradient, as its subspace sees it, or with `by="global"` of all gradients
    together, at the price of a second backward pass: `with layers.measuring(): loss(batch).backward()` before the one
    that steps.
    Not for DistributedDataParallel, fully sharded weights and GradScaler, which need gradients after the pass.
    """
    return PerLayer(optimizer, accumulate, clip, by)


def _clip_factor(norm: Tensor, clip: float) -> Tensor:
    return (clip / (norm + 1e-6)).clamp_max_(1.0)


def _check(accumulate: int, clip: float | None, by: str) -> None:
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}: give the number of backward passes per step, 1 or more")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}: give a norm above 0, or None")
    if by not in CLIPS:
        raise ValueError(f"by {by!r} is unknown; choose from {', '.join(CLIPS)}")
    if by == "global" and clip is None:
        raise ValueError("by='global' without clip would do nothing: give clip, or leave `by` out")
    if by == "global" and accumulate > 1:
        raise ValueError(f"the norm of {accumulate} summed gradients needs all of them at once: clip by='parameter', "
                         "or accumulate=1")  # fmt: skip
