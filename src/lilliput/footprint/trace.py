"""The memory that a training step needs, found by running the real code on fake tensors, which take none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.core.meter import Instrument
from lilliput.fake import copied, like
from lilliput.footprint.accelerator import ACCELERATOR, CPU, faking
from lilliput.footprint.result import KINDS, Footprint
from lilliput.footprint.steps import Steps

PROJECTIONS = ("P", "P2")  # names of the projections in a subspace optimizer's state


def trace(
    model: nn.Module, make: Callable[[nn.Module], Steps], batch: Any, device: str = "cuda", autocast: bool = False
) -> Footprint:
    """The certified footprint of one training step: the step runs, on fake tensors.

    model:    any module, on any device, "meta" included; it stays as it is.
    make:     makes the training of a copy of the model.
    batch:    a batch as its step takes it; only shapes and dtypes of its tensors count.
    device:   "cpu", or the kind of an accelerator (any with an attention kernel that keeps no scores).
    autocast: whether the step uses it.
    """
    accelerator = device != "cpu"
    place = ACCELERATOR if accelerator and not autocast else CPU  # the meta device knows no autocast
    padded = isinstance(batch, Mapping) and "attention_mask" in batch
    with faking(accelerator, autocast, padded), Trace(copies_to_promote=not accelerator) as seen:
        steps = make(copied(model, partial(like, device=place)).train())
        steps.prepare()
        seen.follow(steps)
        steps.step(_map(batch, partial(like, device=place)))
        return seen.footprint(sum(p.numel() for p in model.parameters()))


class Trace(Instrument):
    """Counts bytes by kind of tensor: at the step's peak, and of each kind when it is largest.

    copies_to_promote: operands of different dtypes are copied into the wider one, as on a CPU; kernels of accelerators
    convert what they read.
    """

    def __init__(self, copies_to_promote: bool = False) -> None:
        super().__init__()
        self._copies = copies_to_promote
        self.kind = "weights"  # of what is allocated now
        self.now = dict.fromkeys(KINDS, 0)
        self.largest, self.at_peak = dict(self.now), dict(self.now)
        self._kinds: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._copies and torch.Tag.pointwise in func.tags:
            self._pass_through(_promoted([x for x in args if isinstance(x, Tensor) and x.dim()]))
        return out

    def _pass_through(self, nbytes: int) -> None:
        """Count bytes that exist only during an operation."""
        if self.bytes + nbytes > self.peak_bytes:
            self.peak_bytes = self.bytes + nbytes
            self.at_peak = {**self.now, self.kind: self.now[self.kind] + nbytes}
        self.largest[self.kind] = max(self.largest[self.kind], self.now[self.kind] + nbytes)

    def _track(self, storage: Any, nbytes: int) -> None:
        key = id(storage)
        if key in self._live:
            return
        self._kinds[key] = self.kind
        self._add(self.kind, nbytes)
        super()._track(storage, nbytes)
        if self.bytes == self.peak_bytes:
            self.at_peak = dict(self.now)

    def _free(self, key: int) -> None:
        self.now[self._kinds.pop(key)] -= self._live.get(key, 0)
        super()._free(key)

    def _add(self, kind: str, nbytes: int) -> None:
        self.now[kind] += nbytes
        self.largest[kind] = max(self.largest[kind], self.now[kind])

    def _mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Move tensors that are already counted to another kind."""
        for x in tensors:
            key = id(x.untyped_storage())
            if key in self._live:
                self.now[self._kinds[key]] -= self._live[key]
                self._kinds[key] = kind
                self._add(kind, self._live[key])

    def follow(self, steps: Steps) -> None:
        """Count maxima from here on; from here on also tell states, gradients and scratch from activations."""
        state = list(_leaves(steps.state()))
        self._mark((x for name, x in state if name not in PROJECTIONS), "states")
        self._mark((x for name, x in state if name in PROJECTIONS), "projections")
        for p in steps.params:
            p.register_hook(lambda grad: self._mark([grad], "gradients"))
            p.register_post_accumulate_grad_hook(self._arrived)
        owner, methods = steps.updates
        for name in methods:
            if hasattr(owner, name):
                setattr(owner, name, self._as_scratch(owner, getattr(owner, name)))
        self.kind, self.flops, self.peak_bytes = "activations", 0.0, self.bytes
        self.largest, self.at_peak = dict(self.now), dict(self.now)

    def _arrived(self, p: Tensor) -> None:
        if p.grad is not None:  # it may be a copy of what came, and may be used up already
            self._mark([p.grad], "gradients")

    def _as_scratch(self, owner: Any, update: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before, self.kind = self.kind, "scratch"
            try:
                return update(*args, **kwargs)
            finally:
                self.kind = before
                state = owner.state.get(args[0], {}) if args and isinstance(args[0], Tensor) else {}
                self._mark((state[name] for name in PROJECTIONS if name in state), "projections")  # if it was renewed

        return run

    def footprint(self, parameters: int) -> Footprint:
        """What was counted."""
        return Footprint(**self.largest, at_peak=self.at_peak, parameters=parameters, certified=True)


def _promoted(operands: list[Tensor]) -> int:
    """Bytes of copies in the common dtype of the operands that have another one."""
    common = reduce(torch.promote_types, (x.dtype for x in operands), torch.bool)
    return sum(x.numel() * common.itemsize for x in operands if x.dtype != common)


def _map(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(batch, Mapping):
        return {name: _map(x, change) for name, x in batch.items()}
    return tuple(_map(x, change) for x in batch) if isinstance(batch, list | tuple) else change(batch)


def _leaves(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an optimizer's state, with its name there."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _leaves(value, key if isinstance(key, str) else name)
    elif isinstance(state, Tensor):
        yield name, state
