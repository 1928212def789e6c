"""The optimizer of a run by its name: ours, with the model's linear layers projected, or any of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import optim
from lilliput.optim.options import DEFAULTS
from lilliput.pretraining.config import Pretrain
from lilliput.registry import is_path, nearest, resolve
from lilliput.updates import OPTIMIZERS, from_body, to_body

# Where a name's torch counterpart has fewer abilities than ours, ours runs: equal to torch's, step by step.
OURS: dict[str, Callable[..., Any]] = {
    **{name: make for name, make in OPTIMIZERS.items() if name not in ("sgd", "adam", "adamw")},
    "adamw": partial(optim.GaLoreAdamW, eps=1e-8),
}
TORCH = {"sgd": "SGD", "adam": "Adam"}
ALIASES = {"adam8bit": "adamw8bit"}
GIVEN = ("self", "params", "lr", "weight_decay", "subspace", "no_deprecation_warning")  # not set by `optimizer.…=`


def names() -> list[str]:
    """The names of `optimizer=`."""
    return [*OURS, *TORCH]


def known_options(name: str) -> list[str]:
    """What `optimizer.…=` may set for a name."""
    made = _target(name)
    own = [option for option in inspect.signature(_rule(made)).parameters if option not in GIVEN]
    return [*own, *(["guard", "rank", "targets", *DEFAULTS] if projects(name) else [])]


def projects(name: str) -> bool:
    """Whether an optimizer of this name projects gradients."""
    made = _target(name)
    return isinstance(made, partial) and bool(made.args)


def build(model: nn.Module, c: Pretrain) -> torch.optim.Optimizer:
    """The optimizer of the settings over a model's trainable parameters.

    Raises ValueError for an unknown name or option, for a rank that nothing has, and for what only ours can do.
    """
    options = {"weight_decay": c.weight_decay, **c.optimizer_options}
    make, known = _target(c.optimizer), known_options(c.optimizer)
    for option in c.optimizer_options:
        if option not in known:
            raise ValueError(f"optimizer {c.optimizer} has no option {option!r}; {nearest(option, known)}")
    params: Any = [p for p in model.parameters() if p.requires_grad]
    if projects(c.optimizer):
        rank = int(options.get("rank", getattr(make, "keywords", {}).get("rank", 128)))
        params = optim.param_groups(model, rank, options.pop("targets", "all-linear"))
    made = make(params, lr=c.lr, **options)
    if not isinstance(made, optim.SubspaceOptimizer) and (c.per_layer or c.parallel == "fsdp"):
        what = "per_layer=true" if c.per_layer else "parallel=fsdp"
        raise ValueError(f"{what} works with our own optimizers, not {c.optimizer}; choose one of {', '.join(OURS)}")
    return made


def _target(name: str) -> Callable[..., Any]:
    if is_path(name):
        return resolve("optimizer", name, {})
    table = {**OURS, **{ours: getattr(torch.optim, theirs) for ours, theirs in TORCH.items()}}
    return resolve("optimizer", ALIASES.get(name, name), table)


def _rule(made: Any) -> Any:
    """The class behind a name: itself, or what a partial makes."""
    if not isinstance(made, partial):
        return made
    return made.args[0] if made.args else made.func


def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer knows, as a body on the CPU; under FSDP a collective call."""
    packed = optimizer.state_dict()
    held: dict[str, Any] = to_body(packed["state"])
    return {"state": held, "skipped": {str(i): g.get("skipped", 0) for i, g in enumerate(packed["param_groups"])}}


def load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take back what `state` gave.  Settings such as lr stay those of the optimizer.

    Raises ValueError if it belongs to another optimizer or model.
    """
    packed = optimizer.state_dict()
    groups = packed["param_groups"]
    for i, group in enumerate(groups):
        if "skipped" in group:
            group["skipped"] = saved["skipped"].get(str(i), 0)
    known = {str(key) for group in groups for key in group["params"]}
    if saved["state"].keys() - known:
        raise ValueError("the optimizer's state is of a model with more parameters")
    restored = {int(key): from_body(value) for key, value in saved["state"].items()}
    optimizer.load_state_dict({"state": restored, "param_groups": groups})


def skipped(optimizer: torch.optim.Optimizer) -> int:
    """Updates left out because a gradient was not finite, over all parameters so far."""
    return sum(int(group.get("skipped", 0)) for group in optimizer.param_groups)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors."""
    return sum(x.nbytes for held in optimizer.state.values() for x in held.values() if isinstance(x, Tensor))
