"""The memory and FLOPs of a call.

One step per (handler, shapes, batch shape) runs under an instrument, and its cost is cached: the peak of live tensor
bytes, and the FLOPs of matrix products and convolutions (2 per multiply-add), forward and backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lilliput.core.tree import Body, tensors

Out = TypeVar("Out")
_current: ContextVar[Meter | None] = ContextVar("meter", default=None)


class Cost(NamedTuple):
    """The cost of one step: its FLOPs, and the peak of bytes it allocated."""

    flops: float
    peak_bytes: int


class Instrument(TorchDispatchMode):
    """Counts FLOPs and the peak of live bytes of the tensors that operations inside it allocate."""

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self._registry = flop_registry
        self._live: dict[int, int] = {}
        self.flops = 0.0
        self.bytes = 0
        self.peak_bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch would import its compiler at the first operation, which costs every process a second.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # An input that no earlier operation made was there before the step, so it is not the step's memory.
        for x in _flat(args):
            self._track(x.untyped_storage(), 0)
        out = func(*args, **kwargs)
        count = self._registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for x in _flat(out if isinstance(out, list | tuple) else (out,)):
            self._track(x.untyped_storage(), x.untyped_storage().nbytes())
        return out

    def _track(self, storage: Any, nbytes: int) -> None:
        key = id(storage)
        if key in self._live:
            return
        self._live[key] = nbytes
        self.bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.bytes -= self._live.pop(key, 0)


def process_memory(device: torch.device) -> int:
    """The peak of bytes allocated on a GPU, or of this process's main memory; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return 0


def _flat(values: Any) -> list[Tensor]:
    dense = []
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided:  # the parts of a sparse tensor appear as tensors of their own
                dense.append(value)
        elif isinstance(value, list | tuple):
            dense.extend(_flat(value))
    return dense


class Meter:
    """Accounts for the memory and FLOPs of one call of a handler; `metered` reports steps to the meter in force.

    Peak memory is what the call holds throughout (message, client state, model, optimizer), plus the larger of what a
    step allocates and what the call returns.  A tensor with several of these roles counts once.
    """

    def __init__(self, cache: dict[Any, Cost], handler: str, message: Body, state: Body):
        self._cache = cache
        self._steps: dict[Any, Cost] = {}
        self._handler, self._given = handler, (message, state)
        self._there = _distinct((*tensors(message), *tensors(state)))
        self._working: dict[Place, Tensor] = {}  # what the largest step works on
        self._kept = 0
        self.flops = 0.0

    def __enter__(self) -> Meter:
        self._token = _current.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)

    def step(self, label: Any, held: Callable[[], Iterable[Tensor]], run: Callable[[], Out]) -> Out:
        """Run a step; instrument it if none with this handler, `label` and shapes of message and state was measured.

        The state's shapes belong to the key: a step that continues from a state may do less, and a cost must not depend
        on which step was measured first.
        """
        cost = self._steps.get(label)
        if cost is not None:  # all but a call's first step of a kind; the small key keeps this fast for small models
            self.flops += cost.flops
            return run()
        out, cost = self._measured(label, run)
        self._working = max(self._working, _distinct(held(), but=self._there), key=_bytes)
        self._steps[label] = cost
        self.flops += cost.flops
        return out

    def _measured(self, label: Any, run: Callable[[], Out]) -> tuple[Out, Cost]:
        key = self.kind(label)
        if key in self._cache:
            return run(), self._cache[key]
        with Instrument() as probe:
            out = run()
        self._cache[key] = Cost(probe.flops, probe.peak_bytes)
        return out, self._cache[key]

    def kind(self, label: Any) -> Any:
        """The cache key: steps with the same key cost the same."""
        return self._handler, *(tuple(x.shape for x in tensors(body)) for body in self._given), label

    def keep(self, reply: Body, state: Body) -> None:
        """Record what the call returns."""
        self._kept = _bytes(_distinct((*tensors(reply), *tensors(state)), but=self._there | self._working))

    @property
    def peak_memory_bytes(self) -> int:
        allocated = max((cost.peak_bytes for cost in self._steps.values()), default=0)
        return _bytes(self._there) + _bytes(self._working) + max(allocated, self._kept)


Place = tuple[int, int]


def _distinct(values: Iterable[Tensor], but: Mapping[Place, Tensor] = MappingProxyType({})) -> dict[Place, Tensor]:
    """Tensors by their place in memory (storage and byte), without those of `but`."""
    dense = (x for x in _parts(values) if x.numel())
    placed = {(x.untyped_storage()._cdata, int(x.storage_offset()) * x.itemsize): x for x in dense}
    return {place: x for place, x in placed.items() if place not in but}


def _parts(values: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors, with each sparse one replaced by its indices and values."""
    for x in values:
        yield from (x._indices(), x._values()) if x.layout == torch.sparse_coo else (x,)


def _bytes(placed: Mapping[Place, Tensor]) -> int:
    return sum(x.nbytes for x in placed.values())


def metered(label: Any, held: Callable[[], Iterable[Tensor]], run: Callable[[], Out]) -> Out:
    """Run a step under the meter in force, if there is one; `held` returns the tensors that the step works on."""
    meter = _current.get()
    return run() if meter is None else meter.step(label, held, run)
