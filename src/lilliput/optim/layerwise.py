"""Each parameter updated in the backward pass as soon as its gradient is there: one dense gradient lives at a time.

    layers = per_layer(optimizer, accumulate=4)
    for batch in batches:                       # every fourth backward pass steps
        (loss(batch) / 4).backward()

Over micro-batches, gradients of projected matrices accumulate in the subspace.  They accumulate in full where the whole
gradient is needed: when a new subspace is due, under online PCA, and for what is not projected.

Several processes sum what accumulated, once a step: a projection is linear, so that the sum of gradients seen in the
subspace is the summed gradient seen there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from lilliput.lean.policy import fast
from lilliput.optim import sharded, subspace
from lilliput.optim.driver import SubspaceOptimizer, Work
from lilliput.optim.gradients import own
from lilliput.optim.options import ranked
from lilliput.optim.processes import wrapped
from lilliput.optim.states import working_dtype

CLIPS = ("parameter", "global")
NONE_LEFT = -1  # in place of a parameter's number


class Peers(Protocol):
    """The processes that train one model side by side: `optim.Processes`, or what has its methods."""

    def sum(self, x: Tensor) -> Tensor:
        """x summed over all processes (or their mean, where losses are means), in place."""

    def same(self, number: int) -> bool:
        """Whether all processes gave this number."""


class PerLayer:
    """The hooks on an optimizer's parameters.  `optimizer.step()` then finds no gradients and does nothing."""

    def __init__(
        self, optimizer: SubspaceOptimizer, accumulate: int = 1, clip: float | None = None, by: str = "parameter",
        processes: Peers | None = None,
    ):  # fmt: skip
        _check(accumulate, clip, by)
        _check_optimizer(optimizer, clip, processes)
        self.optimizer, self.accumulate, self.clip, self.by = optimizer, accumulate, clip, by
        self.processes = processes
        self._here: set[Tensor] = set()  # parameters whose gradient has come in this pass
        self._pass = 1
        self._open: set[Tensor] = set()  # parameters with gradients that have not been applied
        self._waiting = False  # whether updates wait for `complete`, as processes came to different parameters
        self._sums: dict[Tensor, Tensor] = {}
        self._norm2: list[Tensor] | None = None
        self._factor: Tensor | None = None
        self._clipped: set[Tensor] = set()  # parameters that the measured norm has served
        self._groups: dict[Tensor, tuple[int, int]] = {}  # parameter -> its number and its group's
        for at, group in enumerate(optimizer.param_groups):
            self._groups.update({p: (len(self._groups) + i, at) for i, p in enumerate(group["params"])})
        self._hooks = {p: _Hook(self) for p in self._groups if p.requires_grad}
        self._handles = [p.register_post_accumulate_grad_hook(hook) for p, hook in self._hooks.items()]
        self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.complete()))
        self._unwrapped = False

    def remove(self) -> None:
        """Take the hooks off; a half-accumulated step is lost."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooks, self._sums, self._open = [], {}, {}, set()

    def begin(self, left: int) -> None:
        """A pass begins, and so many of its step come after it.

        Where nobody says so, a pass begins with a parameter that comes again.
        """
        self._here, self._pass = set(), self.accumulate - left

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A first backward pass that only measures the norm of all gradients, for the next one to be clipped by."""
        self._norm2, self._factor, self._clipped = [], None, set()
        try:
            yield
            self.complete()
        finally:
            squares, self._norm2 = self._norm2, None
        if self.clip is not None and squares:
            self._factor = _clip_factor(torch.stack(squares).sum().sqrt(), self.clip)

    @torch.no_grad()
    def complete(self) -> None:
        """Apply what a step has left: gradients that came in some passes but not in the last, or not in all processes.

        `optimizer.step()` calls it too.  Several processes must, after the last pass of every step.
        """
        missing = [p for p in self._hooks if p in self._open]
        if self.processes is not None:
            if not self._waiting:
                self._waiting = not self.processes.same(NONE_LEFT)
            missing = self._agreed() if self._waiting else []
        for p in missing:
            with fast(p.device):
                work = self._seen(p) if p in self._sums or p not in self._open else None
                if work is None and p.grad is None:  # other processes have one, of a branch that was not taken here
                    p.grad = torch.zeros_like(p)
                self._take(p, work)
        self._here, self._pass, self._open, self._waiting = set(), 1, set(), False

    def _agreed(self) -> list[Tensor]:
        """Parameters of which any process has gradients to apply."""
        assert self.processes is not None
        device = next(iter(self._hooks)).device
        present = torch.tensor([float(p in self._open) for p in self._hooks], device=device)
        counts = self.processes.sum(present).tolist()
        return [p for p, n in zip(self._hooks, counts, strict=True) if n]

    @torch.no_grad()
    def _arrived(self, p: Tensor) -> None:
        assert p.grad is not None
        if not self._unwrapped:
            _refuse_wrapped(self._groups)
            self._unwrapped = True
        if self._norm2 is None:
            self._count(p)
        self._open.add(p)
        p.grad = own(p.grad)
        with fast(p.device):
            work = self._seen(p)
            if self._norm2 is not None or self._pass == self.accumulate:
                self._ready(p, work)

    def _count(self, p: Tensor) -> None:
        """Which pass this is: one ends where a parameter comes again."""
        if p in self._here:
            self._here, self._pass = set(), self._pass + 1
        if self._pass > self.accumulate:
            if self._open:
                raise RuntimeError(f"{len(self._open)} parameters had no gradient in the last pass of a step: call "
                                   "`layers.complete()` or `optimizer.step()` after it")  # fmt: skip
            self._pass = 1
        self._here.add(p)

    def _seen(self, p: Tensor) -> Work | None:
        """The gradient as its subspace sees it, added to those before and then freed; None where it stays whole."""
        group = self._group(p)
        if self._norm2 is not None or self.accumulate == 1 or not self._compresses(p, group):
            return None
        work = self.optimizer.prepare(p, torch.zeros_like(p) if p.grad is None else p.grad, group)
        self._sums[p] = work.R + self._sums[p] if p in self._sums else work.R
        work.G = p.grad = None
        return work

    def _group(self, p: Tensor) -> dict[str, Any]:
        return self.optimizer.param_groups[self._groups[p][1]]  # load_state_dict replaces them

    def _compresses(self, p: Tensor, group: dict[str, Any]) -> bool:
        if not ranked(group) or group["update"] != "project" or subspace.learns(group) or sharded.is_sharded(p):
            return False
        return p in self._sums or not subspace.due(self.optimizer.ready(p, group), group)

    def _ready(self, p: Tensor, work: Work | None) -> None:
        if self.processes is not None and not self._waiting:
            # Sums of different parameters would be mixed up without a word.
            self._waiting = not self.processes.same(self._groups[p][0])
        if not self._waiting:
            self._take(p, work)

    def _take(self, p: Tensor, work: Work | None) -> None:
        """Apply what has accumulated, or measure it."""
        self._open.discard(p)
        group, grad = self._group(p), p.grad
        p.grad = None
        R = self._sums.pop(p, None)
        if self.processes is not None:
            self.processes.sum(grad if R is None else R)  # type: ignore[arg-type]
        if R is not None:
            assert work is not None
            work.R, work.probe = R, R.sum()
            self._finish(work, group)
            return
        assert grad is not None
        if self._norm2 is not None:
            self._norm2.append(torch.linalg.vector_norm(grad, dtype=working_dtype(p.dtype)).square())
        else:
            self._step(p, grad, group)

    def _step(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if self.by == "global" and self.clip is not None:
            if self._factor is None or p in self._clipped:
                raise RuntimeError("global clipping needs the norm of all gradients first: before each step, run a "
                                   "backward pass inside `with layers.measuring():`")  # fmt: skip
            self._clipped.add(p)
            grad.mul_(self._factor)
        if ranked(group) and not sharded.is_sharded(p):
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


class _Hook:
    """What a parameter is hooked by; another `PerLayer` finds it there."""

    def __init__(self, layers: PerLayer):
        self.layers = layers

    def __call__(self, p: Tensor) -> None:
        self.layers._arrived(p)


def per_layer(
    optimizer: SubspaceOptimizer, accumulate: int = 1, clip: float | None = None, by: str = "parameter",
    processes: Peers | None = None,
) -> PerLayer:  # fmt: skip
    """Update parameters in the backward pass.

    accumulate: backward passes per step; divide each loss by it, as usual.  If a pass may leave a parameter without a
    gradient, call `optimizer.step()` after the last one.
    clip: the largest norm of each parameter's gradient, as its subspace sees it, or with `by="global"` of all gradients
    together, at the price of a second backward pass: `with layers.measuring(): loss(batch).backward()` before the one
    that steps.
    processes: those that train copies of the model side by side, in place of DistributedDataParallel: gradients are
    summed over them as they come.  Call `optimizer.step()` in each after the last pass of a step.

    Weights of `fully_shard` work too, without clip.  Frozen parameters are left out.  Not for GradScaler, which needs
    gradients after the pass.  Raises ValueError for optimizers that are not ours, for parameters that are hooked
    already, and for those of DistributedDataParallel.
    """
    return PerLayer(optimizer, accumulate, clip, by, processes)


def _check_optimizer(optimizer: Any, clip: float | None, processes: Peers | None) -> None:
    if not isinstance(optimizer, SubspaceOptimizer):
        raise ValueError(f"per_layer updates parameters one by one, which {type(optimizer).__name__} cannot; use one "
                         "of lilliput.optim: without a rank, GaLoreAdamW is torch's AdamW")  # fmt: skip
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        hooks = (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()
        if any(isinstance(hook, _Hook) for hook in hooks):
            raise ValueError(f"a weight of shape {tuple(p.shape)} is updated per layer already; `remove()` the hooks "
                             "there before")  # fmt: skip
    _refuse_wrapped(params)
    if any(sharded.is_sharded(p) for p in params):
        if clip is not None:
            raise ValueError(f"clip={clip} needs whole gradients, which no process has of fully sharded weights; leave "
                             "it out, or clip_grad_norm_ after the pass, without per_layer")  # fmt: skip
        if processes is not None:
            raise ValueError("fully_shard sums gradients itself; leave processes out")


def _refuse_wrapped(params: Any) -> None:
    name = wrapped(params)
    if name is not None:
        raise ValueError(f"{name} keeps gradients for after the pass and would let its processes part; unwrap the "
                         "model and use per_layer(..., processes=optim.Processes(mean=True))")  # fmt: skip


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
