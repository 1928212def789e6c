"""The optimizers by name, for `run`, `pretrain` and `memory`: what a name stands for, its options, how it is made."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import optim
from lilliput.core.registry import described, nearest, resolve

Optimizer = str | Callable[..., Any]  # a name of ours, `torch.optim:RMSprop`, or a function of (parameters, lr, ...)


def _subspace(
    optimizer: Callable[..., Any], params: Any, lr: float, *, rank: int = 128, proj_type: str = "std",
    update_proj_gap: int = 200, scale: float = 0.25, **options: Any,
) -> Any:  # fmt: skip
    """A subspace optimizer; matrices whose both sides exceed the rank are projected.

    rank: of the subspace; proj_type: how it is found; update_proj_gap: steps between refreshes; scale: of the update
    """
    subspace = {"proj_type": proj_type, "update_proj_gap": update_proj_gap, "scale": scale}
    return optimizer(params, lr=lr, **subspace, **options)


def _galore(words: str, optimizer: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return described(words, _subspace, optimizer, **options)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": partial(optim.GaLoreAdamW, eps=1e-8),  # moments in float32 whatever the weights are
    "adamw8bit": optim.GaLoreAdamW8bit,
    "adafactor": optim.GaLoreAdafactor,
    "lion": optim.Lion,
    "galore_adamw": _galore(
        "AdamW on gradients projected to a subspace (GaLore): for matrices whose full AdamW state does not fit",
        optim.GaLoreAdamW,
    ),
    "galore_adamw8bit": _galore(
        "galore_adamw with its moments in 8-bit codes: for a quarter of its moments' memory",
        optim.GaLoreAdamW8bit,
    ),
    "galore_adafactor": _galore(
        "Adafactor on projected gradients: row and column means in place of most of galore_adamw's moments",
        optim.GaLoreAdafactor,
    ),
    "galore_lion": _galore(
        "Lion on projected gradients: one moment instead of galore_adamw's two, for smaller learning rates",
        optim.GaLoreLion,
    ),
    "fira": _galore(
        "galore_adamw that adds the rest of the gradient, scaled (Fira): where a small rank loses too much",
        optim.GaLoreAdamW,
        update="fira",
    ),
    # APOLLO's own projection is random, and its paper's scales are 1 and the root of 128.
    "apollo": _galore(
        "The whole gradient, channels scaled as AdamW does in a random subspace (APOLLO): stores no P, needs no SVD",
        optim.GaLoreAdamW,
        update="apollo",
        proj_type="seeded",
        scale=1.0,
    ),
    "apollo_mini": _galore(
        "apollo of rank one, with one scale for each matrix: the smallest state",
        optim.GaLoreAdamW,
        update="apollo_mini",
        proj_type="seeded",
        rank=1,
        scale=128**0.5,
    ),
    "online_subspace_adamw": _galore(
        "AdamW in a subspace that learns at every step (Online Subspace Descent): changes smoothly, needs no SVD",
        optim.GaLoreAdamW,
        proj_type="continuous",
    ),
    "online_subspace_adamw8bit": _galore(
        "online_subspace_adamw with the weights' moments in 8-bit codes, and those of P as they are",
        optim.GaLoreAdamW8bit,
        proj_type="continuous",
    ),
    "online_subspace_adafactor": _galore(
        "Adafactor in a subspace that learns at every step: row and column means in place of most moments",
        optim.GaLoreAdafactor,
        proj_type="continuous",
    ),
    "online_subspace_lion": _galore(
        "Lion in a subspace that learns at every step: one moment instead of two, for smaller learning rates",
        optim.GaLoreLion,
        proj_type="continuous",
    ),
}
ALIASES = {"adam8bit": "adamw8bit"}
BY_SIZE = ("Adafactor", "GaLoreAdafactor", "ASGD")  # whose steps go by the size of the weight
OURS = [name for name in OPTIMIZERS if name not in ("sgd", "adam")]  # for per_layer, shards and memory's formulas


def find(optimizer: Optimizer, known: Mapping[str, Any] = OPTIMIZERS) -> Callable[..., Any]:
    """What an optimizer's name stands for; anything but a name is itself.  Raises ValueError for an unknown one."""
    if not isinstance(optimizer, str):
        return optimizer
    return resolve("optimizer", ALIASES.get(optimizer, optimizer), known)


def projects(optimizer: Optimizer, options: Mapping[str, Any] | None = None) -> bool:
    """Whether an optimizer projects gradients: by its name, or as one of ours that is given a rank."""
    made = find(optimizer)
    return getattr(made, "func", None) is _subspace or (_is_ours(made) and "rank" in (options or {}))


def default_rank(optimizer: Optimizer) -> int:
    """The rank of an optimizer that projects, where none is given."""
    return int(inspect.signature(find(optimizer)).parameters["rank"].default)


def known_options(made: Callable[..., Any]) -> list[str] | None:
    """The options of an optimizer, from what `find` gave; None for a function that takes any."""
    rule = _rule(made)
    try:
        parameters = list(inspect.signature(rule).parameters.values())[1:]
    except (TypeError, ValueError):  # written in C
        return None
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in ("lr", "self")]
    if not _is_ours(rule):
        return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else names
    names.append("guard")
    subspace = isinstance(rule, type) and any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [*names, *(["rank", "targets", *optim.options.DEFAULTS] if subspace else [])]


def _rule(made: Callable[..., Any]) -> Callable[..., Any]:
    """What is made in the end, where a name stands for a rule in a subspace."""
    return made.args[0] if isinstance(made, partial) and made.func is _subspace else made


def _is_ours(rule: Any) -> bool:
    rule = getattr(rule, "func", rule)
    return isinstance(rule, type) and issubclass(rule, optim.SubspaceOptimizer)


def settled(
    optimizer: Optimizer, options: Mapping[str, Any], weight_decay: float, known: Mapping[str, Any] = OPTIMIZERS
) -> dict[str, Any]:
    """The options that an optimizer is made with: those given, and the decay, 0 too, whatever a class's own default is.

    Raises ValueError for an unknown optimizer or option, for a value that nothing can be trained with, and for a decay
    given to an optimizer that has none.
    """
    made = find(optimizer, known)
    names, name = known_options(made), optimizer if isinstance(optimizer, str) else _named(made)
    for option in options:
        if names is not None and option not in names:
            raise ValueError(f"optimizer {name} has no option {option!r}; {nearest(option, names)}")
    foreign = isinstance(made, type) and issubclass(made, torch.optim.Optimizer) and not _is_ours(made)
    if foreign and options:
        _try(made, name, options)
    elif _is_ours(made) or made in known.values():
        rule = getattr(_rule(made), "rule", None)
        optim.options.check_values(options, sign=rule is not None and rule.sign)
    bound = made.keywords if isinstance(made, partial) else {}
    if "weight_decay" in options or "weight_decay" in bound:
        return dict(options)
    if "weight_decay" in names if names is not None else weight_decay:
        return {"weight_decay": weight_decay, **options}
    if weight_decay:
        raise ValueError(f"optimizer {name} has no weight_decay, which is {weight_decay}; set it to 0")
    return dict(options)


def reads_weights(made: Any) -> bool:
    """Whether the steps of an optimizer, once made, depend on the weights: by decay, size or, if unknown, perhaps."""
    familiar = type(made).__module__.startswith(("lilliput.", "torch.optim"))
    decays = any(group.get("weight_decay") for group in made.param_groups)
    return decays or not familiar or type(made).__name__ in BY_SIZE


def decouples(made: Any) -> bool:
    """Whether the weight decay of an optimizer, once made, stays out of the gradient."""
    default = isinstance(made, optim.SubspaceOptimizer) or type(made).__name__ in ("AdamW", "Adafactor", "Muon")
    return all(group.get("decoupled_weight_decay", default) for group in made.param_groups)


def _try(made: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Let an optimizer of torch or of a user say itself what is wrong with its options."""
    try:
        made([nn.Parameter(torch.zeros(1, 1))], lr=1.0, **options)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"optimizer {name} cannot be made with {dict(options)}: {error}") from None


def _named(made: Any) -> str:
    return str(getattr(made, "__name__", None) or getattr(getattr(made, "func", made), "__name__", made))


def check_projects(optimizer: Optimizer, options: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError if an optimizer that projects would project nothing of a model."""
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say of the groups is said when they train
        _groups(optimizer, params, dict(options), model, strict=True)


def _groups(
    optimizer: Optimizer, params: Sequence[Tensor], options: dict[str, Any], model: nn.Module | None, strict: bool
) -> Any:
    """The parameters, or groups of them where some are projected; takes the options that say so out of `options`."""
    if not projects(optimizer, options):
        return list(params)
    rank = options.pop("rank") if "rank" in options else default_rank(optimizer)
    return optim.groups.of(list(params), rank, model, options.pop("targets", "all-layers"), strict)


def build(
    optimizer: Optimizer, params: Sequence[Tensor], lr: float, options: Mapping[str, Any],
    model: nn.Module | None = None, strict: bool = True,
) -> Any:  # fmt: skip
    """An optimizer of parameters, with options from `settled`.

    model:  where they are, for optimizers that project: linear and convolutional layers but the output head; all
            matrices for None.
    strict: whether it is an error, ValueError, that nothing has both sides longer than the rank.
    """
    made, options = find(optimizer), dict(options)
    given = _groups(optimizer, params, options, model, strict)
    if options.get("relative_step"):  # its rate follows the step count
        return made(given, lr=None, **options)
    return made(given, lr=lr, **options)
