"""The two halves of a model: the original's own code, on copies whose other half is blank."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.splitter.blank import Blank, blank, blanked
from lilliput.splitter.trace import states
from lilliput.splitter.values import Call, leaves, mapped

Payload = Tensor | dict[str, Tensor]


class Part(nn.Module):
    """A model of which a half is there.  Its parameters, buffers and submodules are called as in the whole model.

    at:      the module that the model is cut before.
    sends:   names of what the cut module is called with that travels; `spread` are those of them that are one for all
             examples, and travel once per example.
    shares:  names of inputs that travel because the server needs them as they are.
    payload: what travels for two examples: shapes by name.
    tied:    the server's names of tensors that the client has too, and its names of them, where they are kept equal.
    """

    sends: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    spread: frozenset[str] = frozenset()

    def __init__(self, whole: nn.Module, at: str):
        super().__init__()
        self.at = at
        self.training = whole.training
        self.payload: dict[str, Shape] = {}
        self.tied: dict[str, str] = {}
        self.called, self.entered = Call(whole), Call(whole.get_submodule(at))
        self.whole = (whole,)  # in a tuple, so that it is no submodule: its children are ours, under its own names
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = whole.__dict__[kind]

    @property
    def cut(self) -> nn.Module:
        return self.whole[0].get_submodule(self.at)

    def dry(self) -> Payload:
        """A payload for two examples, on the meta device."""
        made = {n: x.empty() for n, x in self.payload.items()}
        return made if len(self.sends) + len(self.shares) > 1 else next(iter(made.values()))

    def train(self, mode: bool = True) -> Part:
        super().train(mode)
        core(self).training = self.whole[0].training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Part:
        super()._apply(fn, recurse)
        for module in everything(self):
            for name, x in module.__dict__.items():
                if isinstance(x, Blank):
                    like = fn(torch.empty(0, dtype=x.dtype, device=x.device))
                    module.__dict__[name] = blank(x.shape, like.dtype, like.device, x.origin)
        return self

    def extra_repr(self) -> str:
        return f"of {type(core(self)).__name__}, at {self.at}"


def core(module: nn.Module) -> nn.Module:
    """The module whose code runs: a part of a part is one of the original's."""
    while isinstance(module, Part):
        module = module.whole[0]
    return module


def everything(module: nn.Module) -> Iterator[nn.Module]:
    """All modules of a part, the one at the top being the original's."""
    yield core(module)
    for name, child in module.named_modules():
        if name:
            yield child


class Reached(BaseException):
    """A client's forward has come to its cut, about to call this module.  No Exception: nobody may catch it."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.module, self.taken = module, (args, kwargs)


class Client(Part):
    """The device's part: inputs of the whole model to the payload.

    inputs: names of all inputs it was cut with.
    """

    inputs: frozenset[str] = frozenset()

    @property
    def takes(self) -> nn.Module:
        """The module whose arguments it is called with."""
        return self.whole[0]

    def reach(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Everything that the cut module is called with, by name."""
        with self.cut.register_forward_pre_hook(_raise, with_kwargs=True):
            try:
                self.whole[0](*args, **kwargs)
            except Reached as reached:
                if reached.module is not self.cut:
                    raise  # by a part of this part
                return self.entered.bind(*reached.taken)
        raise RuntimeError(f"{type(core(self)).__name__} came to its end without calling {self.at!r}, where it is cut")

    def forward(self, *args: Any, **kwargs: Any) -> Payload:
        given = leaves(self.called.bind(args, kwargs))
        unknown = [n for n, x in given.items() if isinstance(x, Tensor) and n not in self.inputs]
        if unknown:
            raise ValueError(f"the model was cut without an input {unknown[0]!r}; cut it with an example that has it")
        taken = leaves(self.reach(*args, **kwargs))
        sent = {wire_name(n, self.shares): taken[n] for n in self.sends if isinstance(taken.get(n), Tensor)}
        examples = max((x.shape[0] for n, x in sent.items() if n not in self.spread), default=1)
        payload = {n: x.expand(examples, *x.shape[1:]) if n in self.spread else x for n, x in sent.items()}
        payload |= {n: given[n] for n in self.shares if isinstance(given.get(n), Tensor)}
        return next(iter(payload.values())) if len(self.sends) + len(self.shares) == 1 else payload


def _raise(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    raise Reached(module, args, kwargs)


def wire_name(name: str, inputs: Iterable[str]) -> str:
    """What a value at the cut is called in the payload: its own name, unless an input that travels has it."""
    return f"cut.{name}" if name in inputs else name


@dataclass(frozen=True)
class Shape:
    """What a tensor is like, of which no values are known: each size is a number or a dimension of the payload."""

    sizes: tuple[int | tuple[str, int], ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        """On the meta device, of sizes that depend on nothing."""
        return torch.empty([size for size in self.sizes if isinstance(size, int)], dtype=self.dtype, device="meta")

    def blank(self, name: str, payload: Mapping[str, Tensor]) -> Blank:
        first = next(iter(payload.values()))
        sizes = [s if isinstance(s, int) else payload[s[0]].shape[s[1]] for s in self.sizes]
        dtype = first.dtype if self.dtype.is_floating_point and first.is_floating_point() else self.dtype
        return blank(sizes, dtype, first.device, [f"the input {name}"])


class Server(Part):
    """The server's part: the payload to what the whole model returns.

    It replays the model on blank inputs; what comes in at the cut is replaced by the payload.
    inputs: what the whole model was called with, tensors by their shape.
    """

    inputs: Mapping[str, Any] = MappingProxyType({})

    def forward(self, payload: Payload) -> Any:
        return self.replay({(*self.sends, *self.shares)[0]: payload} if isinstance(payload, Tensor) else payload)

    def replay(self, payload: Mapping[str, Tensor], own: dict[str, Any] | None = None) -> Any:
        """Run on a payload; what the server itself would have called the cut module with is noted in `own`."""
        substitute = {n: payload[wire_name(n, self.shares)] for n in self.sends if wire_name(n, self.shares) in payload}

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            named = self.entered.bind(args, kwargs)
            known = leaves(named)
            lacking = [n for n, x in known.items() if isinstance(x, Blank) and n not in substitute]
            if own is not None:
                own.update(known)
            elif lacking:
                name = wire_name(lacking[0], self.shares)
                raise ValueError(f"the payload has no {name!r}; the server needs all that the client sent")
            return self.entered.unbind(mapped(named, lambda name, x: self._value(name, substitute.get(name, x))))

        def given(name: str, x: Any) -> Any:
            if not isinstance(x, Shape):
                return x
            return payload.get(name) if name in self.shares else x.blank(name, payload)

        args, kwargs = self.called.unbind(mapped(self.inputs, given))
        with self.cut.register_forward_pre_hook(enter, prepend=True, with_kwargs=True):
            return self.whole[0](*args, **kwargs)

    def _value(self, name: str, x: Any) -> Any:
        # One for all examples: unexpanded again if it never left the process, which keeps sums in the whole's order.
        return x[:1] if name in self.spread and isinstance(x, Tensor) and x.stride(0) == 0 else x


def half(model: nn.Module, owned: frozenset[str], lent: frozenset[str] = frozenset()) -> nn.Module:
    """A copy of a model in which every parameter and buffer that is not `owned` (by state-dict name) is blank.

    Nothing is allocated for what is blank.  Buffers that are `lent`, or are in no state dict, are there on both sides.
    """
    memo: dict[int, Any] = {}
    kept = {id(x) for name, x, _, _ in states(model) if name in owned | lent}
    for name, x, _, _ in states(model):
        if id(x) not in kept:
            memo[id(x)] = blanked(x, f"the parameter {name}")
    copied = copy.deepcopy(model, memo)
    for name, x, module, kind in list(states(copied)):
        local = name.rpartition(".")[2]
        if name in lent:
            module._non_persistent_buffers_set.add(local)
        elif name not in owned:
            del module.__dict__[kind][local]
            core(module).__dict__[local] = blanked(x, f"the parameter {name}")
    for module in copied.modules():
        if "_flat_weights" in module.__dict__:  # recurrent layers keep a second list of their weights
            module.__dict__["_flat_weights"] = [getattr(module, n) for n in module.__dict__["_flat_weights_names"]]
    return copied
