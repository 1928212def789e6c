"""The two parts of a model: its own code, on copies with placeholders for what the other part has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lilliput.fake import Placeholder, copied
from lilliput.splitter.names import Signature, leaves, mapped, states

REMEMBERED = 256  # calls of a module whose shapes are remembered

Payload = Tensor | dict[str, Tensor]


class Part(nn.Module):
    """Half of a model.  Its parameters, buffers and submodules are called as in the whole model.

    at:      the module that the model is cut before.
    sends:   names of the cut module's arguments that travel; those in `spread` have one row for all examples, and
             travel once per example.
    shares:  names of inputs that travel because the server needs them as they are.
    payload: what travels for two examples, by name.
    tied:    by the server's name, the client's name of each tensor that both have and a method keeps equal.
    """

    sends: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    spread: frozenset[str] = frozenset()

    def __init__(self, whole: nn.Module, at: str):
        super().__init__()
        self.at = at
        self.training = whole.training
        self.payload: dict[str, TensorSpec] = {}
        self.tied: dict[str, str] = {}
        self.signature, self.cut_signature = Signature(whole), Signature(whole.get_submodule(at))
        self.whole = (whole,)  # in a tuple, so that it is no submodule: its children are ours, under its own names
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[kind] = whole.__dict__[kind]

    @property
    def cut(self) -> nn.Module:
        return self.whole[0].get_submodule(self.at)

    def meta_payload(self) -> Payload:
        """A payload for two examples, on the meta device."""
        payload = {n: spec.meta() for n, spec in self.payload.items()}
        return payload if len(self.sends) + len(self.shares) > 1 else next(iter(payload.values()))

    def train(self, mode: bool = True) -> Part:
        super().train(mode)
        core(self).training = self.whole[0].training = mode
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Part:
        super()._apply(fn, recurse)
        for module in everything(self):
            for name, x in module.__dict__.items():
                if isinstance(x, Placeholder):
                    like = fn(torch.empty(0, dtype=x.dtype, device=x.device))
                    module.__dict__[name] = Placeholder.of(x.shape, like.dtype, like.device, *x.sources)
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
        self.module, self.arguments = module, (args, kwargs)


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
                return self.cut_signature.bind(*reached.arguments)
        raise RuntimeError(f"{type(core(self)).__name__} came to its end without calling {self.at!r}, where it is cut")

    def forward(self, *args: Any, **kwargs: Any) -> Payload:
        given = leaves(self.signature.bind(args, kwargs))
        unknown = [n for n, x in given.items() if isinstance(x, Tensor) and n not in self.inputs]
        if unknown:
            raise ValueError(f"the model was cut without an input {unknown[0]!r}; cut it with an example that has it")
        arguments = leaves(self.reach(*args, **kwargs))
        sent = {wire_name(n, self.shares): arguments[n] for n in self.sends if isinstance(arguments.get(n), Tensor)}
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
class TensorSpec:
    """Shape and dtype of a tensor whose values are not known: each size is a number or a dimension of the payload."""

    sizes: tuple[int | tuple[str, int], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> TensorSpec:
        return cls(tuple(x.shape), x.dtype)

    def meta(self) -> Tensor:
        """A meta tensor of it; all sizes must be numbers."""
        return torch.empty([size for size in self.sizes if isinstance(size, int)], dtype=self.dtype, device="meta")

    def placeholder(self, name: str, payload: Mapping[str, Tensor]) -> Placeholder:
        """The input of this name as a placeholder, sized and placed like the payload."""
        first = next(iter(payload.values()))
        sizes = [s if isinstance(s, int) else payload[s[0]].shape[s[1]] for s in self.sizes]
        dtype = first.dtype if self.dtype.is_floating_point and first.is_floating_point() else self.dtype
        return Placeholder.of(sizes, dtype, first.device, f"the input {name}")


class Server(Part):
    """The server's part: the payload to what the whole model returns.

    It replays the model on placeholders for its inputs; at the cut, the payload takes the place of what comes in.
    inputs: what the whole model was called with, tensors by their specs.
    """

    inputs: Mapping[str, Any] = MappingProxyType({})

    def forward(self, payload: Payload) -> Any:
        return self.replay({(*self.sends, *self.shares)[0]: payload} if isinstance(payload, Tensor) else payload)

    def replay(self, payload: Mapping[str, Tensor], replayed: dict[str, Any] | None = None) -> Any:
        """Run on a payload; `replayed` is filled with what the replay by itself calls the cut module with."""
        substitute = {n: payload[wire_name(n, self.shares)] for n in self.sends if wire_name(n, self.shares) in payload}

        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            named = self.cut_signature.bind(args, kwargs)
            arguments = leaves(named)
            missing = [n for n, x in arguments.items() if isinstance(x, Placeholder) and n not in substitute]
            if replayed is not None:
                replayed.update(arguments)
            elif missing:
                name = wire_name(missing[0], self.shares)
                raise ValueError(f"the payload has no {name!r}; the server needs all that the client sent")
            named = mapped(named, lambda name, x: self._unexpanded(name, substitute.get(name, x)))
            return self.cut_signature.unbind(named)

        def given(name: str, x: Any) -> Any:
            if not isinstance(x, TensorSpec):
                return x
            return payload.get(name) if name in self.shares else x.placeholder(name, payload)

        args, kwargs = self.signature.unbind(mapped(self.inputs, given))
        with self.cut.register_forward_pre_hook(enter, prepend=True, with_kwargs=True):
            return self.whole[0](*args, **kwargs)

    def _unexpanded(self, name: str, x: Any) -> Any:
        # One row for all examples, if it never left the process: sums then have the order that the whole model has.
        return x[:1] if name in self.spread and isinstance(x, Tensor) and x.stride(0) == 0 else x


class ShapeForward:
    """The forward of a module whose parameters the other part has: from shapes of inputs to shapes of outputs.

    The module's own code works them out once, and they are remembered.  If the inputs have values, or some output
    gets them, the module just runs.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.outputs: dict[Any, Any] = {}

    def __reduce__(self) -> Any:
        return ShapeForward, (self.module, self.name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = type(self.module).forward
        inputs = list(leaves((args, kwargs)).values())
        if not any(isinstance(x, Placeholder) for x in inputs):
            return forward(self.module, *args, **kwargs)
        kinds = tuple((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else _constant(x) for x in inputs)
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        key = (kinds, tuple(kwargs), self.module.training, autocast)
        if key in self.outputs:
            return self._output(self.outputs[key])
        with _disable_current_modes():  # nothing is computed here, and no mode is to count it
            out = self._output(forward(self.module, *args, **kwargs))
        if all(isinstance(x, Placeholder) or not isinstance(x, Tensor) for x in leaves(out).values()):
            if len(self.outputs) == REMEMBERED:
                self.outputs.clear()
            self.outputs[key] = out
        return out

    def _output(self, out: Any) -> Any:
        """New placeholders that depend on this module."""
        sources = frozenset([f"the output of {self.name}"])

        def fresh(name: str, x: Any) -> Any:
            return Placeholder(x.meta, x.device, sources) if isinstance(x, Placeholder) else x

        return mapped(out, fresh)


def _constant(x: Any) -> Any:
    return x if isinstance(x, bool | int | float | str | None) else type(x)


def holding(model: nn.Module, owned: frozenset[str], lent: frozenset[str] = frozenset()) -> nn.Module:
    """A copy of a model with placeholders for all parameters and buffers but those `owned`, by their state-dict names.

    Nothing is allocated for a placeholder.  Buffers that are `lent`, or in no state dict, are there on both sides.
    """
    memo: dict[int, Any] = {}
    real = {id(x) for name, x, _, _ in states(model) if name in owned | lent}
    for name, x, _, _ in states(model):
        if id(x) not in real:
            memo[id(x)] = _parameter(name, x)
    part = copy.deepcopy(model, memo)
    for name, x, module, kind in list(states(part)):
        local = name.rpartition(".")[2]
        if name in lent:
            module._non_persistent_buffers_set.add(local)
        elif name not in owned:
            del module.__dict__[kind][local]
            core(module).__dict__[local] = _parameter(name, x)
    for module in part.modules():
        if "_flat_weights" in module.__dict__:  # recurrent layers keep a second list of their weights
            module.__dict__["_flat_weights"] = [getattr(module, n) for n in module.__dict__["_flat_weights_names"]]
    return part


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model or a part on the meta device, which takes no memory."""
    return copied(model).to("meta")  # the placeholders of a part too


def _parameter(name: str, x: Tensor) -> Placeholder:
    return Placeholder.of(x.shape, x.dtype, x.device, f"the parameter {name}")
