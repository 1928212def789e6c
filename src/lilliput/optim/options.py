"""The options of a projected parameter group, with their defaults, and what is refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lilliput.core.registry import nearest
from lilliput.optim.pca import OPTIMIZERS as PCA
from lilliput.optim.states import KINDS

PROJECTIONS = ("std", "reverse_std", "right", "left", "full", "random", "seeded", *PCA)
REFRESHES = ("power", "svd")
UPDATES = ("project", "fira", "apollo", "apollo_mini")
PRECISIONS = ("float32", "bf16")
COMPAT = (None, "official")
CHOICES = {"states": KINDS, "compat": COMPAT, "proj_type": PROJECTIONS, "refresh": REFRESHES, "update": UPDATES,
           "precision": PRECISIONS}  # fmt: skip

DEFAULTS: dict[str, Any] = {
    "update_proj_gap": 200,  # steps between refreshes; for online PCA, 1 / gap is the projection's learning rate
    "scale": 0.25,  # of the update that comes back from the subspace
    "proj_type": "std",
    "refresh": "power",  # svd: the published decomposition, an order of magnitude slower
    "update": "project",  # fira, apollo, apollo_mini: what happens outside the subspace
    "limiter": 1.01,  # how fast the norm of what fira and apollo add may grow per step
    "rotate": False,  # read the moments in the new subspace at a refresh, instead of keeping their numbers
    "lazy": None,  # overlap of old and new subspace from which the gap doubles
    "seed": 0,  # of random, seeded
    "orthogonality": 0.1,  # weight of ||P^T P - I||^2 in the loss of online PCA
    "precision": "float32",  # bf16: of the products with the projection
}


# What else stands in a group: labels, and what schedulers of torch and transformers leave there.
LABELS = {"params", "names", "param_names", "name", "rank", "base_lr", "initial_lr", "max_lr", "min_lr", "lr_scale",
          "swa_lr", "base_momentum", "max_momentum"}  # fmt: skip
RULES = ("lr", "betas", "eps", "weight_decay", "correct_bias", "states", "compat", "guard", "clip_threshold",
         "decay_rate", "beta1", "scale_parameter", "relative_step", "warmup_init")  # fmt: skip


def check_names(group: Mapping[str, Any], allowed: Iterable[str] = RULES) -> None:
    """Raise ValueError for a key that no option of a group has."""
    names = {*LABELS, *DEFAULTS, *allowed}
    for key in group:
        if key not in names:
            raise ValueError(f"a parameter group has no option {key!r}; {nearest(key, names - LABELS | {'rank'})}")


def check_rank(rank: Any) -> None:
    """Raise ValueError for what is no rank."""
    _whole({"rank": rank}, "rank")


def ranked(group: Mapping[str, Any]) -> bool:
    """Whether the parameters of a group are projected."""
    return group.get("rank") is not None


def complete(group: dict[str, Any], given: Mapping[str, Any], official: bool) -> None:
    """Fill a projected group with the optimizer's options and the defaults, in place."""
    for name, value in {**DEFAULTS, **given}.items():
        group.setdefault(name, value)
    if official:
        group.update(refresh="svd", orthogonality=0.0)


def check(group: Mapping[str, Any]) -> None:
    """Raise ValueError, naming value, rule and remedy, for a group that cannot be trained."""
    _positive(group, "lr")
    check_values(group)


def check_values(given: Mapping[str, Any], sign: bool = False) -> None:
    """Raise ValueError for an option that nothing can be trained with, of those that are given.

    sign: whether the rule takes the sign of its update.
    """
    _check_rule(given)
    if sign and str(given.get("update")).startswith("apollo"):
        raise ValueError(f"update {given['update']!r} does nothing to a sign: a scaled gradient has its gradient's; "
                         "choose GaLoreAdamW, or update='project' or 'fira'")  # fmt: skip
    for name in ("rank", "update_proj_gap"):
        if given.get(name) is not None:
            _whole(given, name)
    if "scale" in given:
        _positive(given, "scale")
    if given.get("lazy") is not None and not 0 < given["lazy"] <= 1:
        raise ValueError(f"lazy {given['lazy']} is no overlap of two subspaces; choose a number in (0, 1], or None")
    for name, allowed in CHOICES.items():
        if name in given and given[name] not in allowed:
            near = difflib.get_close_matches(str(given[name]), [str(x) for x in allowed], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name} {given[name]!r} is unknown; choose from {', '.join(map(str, allowed))}{hint}")


def _check_rule(group: Mapping[str, Any]) -> None:
    """Averages forget between nothing (0) and never (below 1); what is added or decays is not negative."""
    averages = {"betas": group.get("betas", ()), "beta1": [x] if (x := group.get("beta1")) is not None else []}
    for name, betas in averages.items():
        for beta in betas if isinstance(betas, list | tuple) else [betas]:
            if not isinstance(beta, Tensor) and not (_is_number(beta) and 0 <= beta < 1):
                raise ValueError(f"{name} hold {beta!r}: give numbers from 0 to below 1")
        if name == "betas" and "betas" in group and (not isinstance(betas, list | tuple) or len(betas) < 2):
            raise ValueError(f"betas is {betas!r}: give a number for each of the two averages")
    eps = group.get("eps", 0.0)
    for name, value in [("weight_decay", group.get("weight_decay", 0.0)),
                        *(("eps", e) for e in (eps if isinstance(eps, tuple | list) else [eps]))]:  # fmt: skip
        if not isinstance(value, Tensor) and not (_is_number(value) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value!r}: give a number that is not negative")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def matrix_shape(p: Tensor) -> tuple[int, int]:
    """A weight as a matrix: (out, in), convolutions (out, in k k)."""
    return p.shape[0], p.shape[1:].numel()


def check_params(group: Mapping[str, Any], sign: bool) -> None:
    """Raise ValueError if a parameter of a projected group has no such subspace; `official` clamps the rank instead.

    sign: whether the rule takes the sign of its update.
    """
    if not ranked(group):
        return
    numbered = [f"parameter {i}" for i in range(len(group["params"]))]
    for name, p in zip(group.get("names") or group.get("param_names") or numbered, group["params"], strict=False):
        _check_matrix(p, name, group["rank"], group["compat"] == "official")
    check_values(group, sign)


def _check_matrix(p: Tensor, name: str, rank: int, official: bool) -> None:
    if p.dim() < 2:
        raise ValueError(f"{name} has shape {tuple(p.shape)}, but a group with a rank projects matrices; "
                         "put vectors into a group without rank, or use optim.param_groups(model)")  # fmt: skip
    m, n = matrix_shape(p)
    if rank > min(m, n) and not official:
        raise ValueError(f"rank {rank} exceeds min(m, n) = {min(m, n)} of {name} ({m} x {n}); "
                         f"choose rank <= {min(m, n)} or put it into a group without rank")  # fmt: skip


def _positive(group: Mapping[str, Any], name: str) -> None:
    value = group[name]
    if isinstance(value, Tensor) or (_is_number(value) and math.isfinite(value) and value > 0):
        return
    if name == "lr" and group.get("relative_step"):
        return
    hint = "; a warm-up from zero belongs to a scheduler, which sets it after construction" if value == 0 else ""
    raise ValueError(f"{name} is {value}: give a number above 0{hint}")


def _whole(group: Mapping[str, Any], name: str) -> None:
    value = group[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{name} {value!r} is no whole number above 0; GaLore's papers use 128 to 1024 as rank, 200 as gap"
        )
