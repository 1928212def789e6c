"""Loads weights from a file into a model: torch's .pt, .pth and .th, and .safetensors.  No file can execute code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lilliput import wire

M = TypeVar("M", bound=nn.Module)


def load_weights(model: M, path: str | Path, state: Mapping[str, Tensor] | None = None) -> M:
    """Overwrite the model's parameters and buffers with those of a file, by name; returns the model.

    The file holds a state dict, or one under the key "state_dict", or the models of a run's best round
    (`best.safetensors`).  Removes the prefix `module.` of a data-parallel program.  `state`, if given, replaces the
    file's content, and `path` only names it in errors.  The file may lack the batch counters of BatchNorm
    (`num_batches_tracked`), and further names of a tied tensor.
    Raises ValueError if the file is missing, damaged or not of weights, if its names or shapes differ from the model's,
    or if it has two values for a tied tensor.
    """
    path = Path(path)
    state = _state_dict(_read(path) if state is None else state, path)
    state = _with_aliases(model, state, path)
    _check(model, state, path)
    model.load_state_dict({**model.state_dict(), **state})
    return model


def _with_aliases(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state with all names of each tied tensor.  Raises ValueError if two names have different values."""
    shared: dict[int, list[str]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        shared.setdefault(id(x), []).append(name)
    complete = dict(state)
    for names in shared.values():
        present = [name for name in names if name in state]
        for name in present[1:]:
            if not torch.equal(state[name], state[present[0]]):
                raise ValueError(
                    f"{str(path)!r} has two values for one tensor: {present[0]!r} and {name!r} are tied in this "
                    f"{type(model).__name__}; untie them in the model, or leave one out of the file"
                )
        complete |= {name: state[present[0]] for name in names if present}
    return complete


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no weights file {str(path)!r}; name a .pt, .pth, .th or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open
            from safetensors.torch import load_file

            with safe_open(path, "pt") as file:
                ours = "lilliput" in (file.metadata() or {})
            return wire.decode(bytearray(path.read_bytes())) if ours else load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file may raise anything
        raise ValueError(f"{str(path)!r} is damaged or not a file of weights ({type(error).__name__})") from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if isinstance(state, Mapping) and isinstance(state.get("models"), Mapping):
        state = _best(state["models"], path)
    if not isinstance(state, Mapping) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise ValueError(f"{str(path)!r} holds no state dict of named tensors; save model.state_dict()")
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    return {name.removeprefix(prefix): x for name, x in state.items()}


def _best(models: Mapping[str, Any], path: Path) -> Any:
    """Parameters and buffers of the first model, the run's.  Raises ValueError if every client has a model."""
    first = next(iter(models), "")
    if first.isdigit() and len(models) > 1:
        raise ValueError(f"{str(path)!r} holds a model for each of {len(models)} clients; save the one you want")
    own = models.get(first)
    return {**own.get("params", {}), **own.get("buffers", {})} if isinstance(own, Mapping) else None


def _check(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError, with the first name that differs, unless `state` fits this model."""
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [name for name in state if name in own and state[name].shape != own[name].shape]
    kind = type(model).__name__
    if missing or unknown:
        which = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which the model lacks"
        raise ValueError(
            f"{str(path)!r} is not for this {kind}: it {which} ({len(missing)} names missing, {len(unknown)} unknown)"
        )
    if shapes:
        name = shapes[0]
        raise ValueError(
            f"{str(path)!r} is not for this {kind}: {name!r} has shape {tuple(state[name].shape)}, "
            f"the model's {tuple(own[name].shape)}; build it with the same shape, classes and options"
        )
