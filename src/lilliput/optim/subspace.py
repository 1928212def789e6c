"""The subspace of one matrix over time: when it is renewed, from what, and what happens to the moments then.

All of it lives in the parameter's state: P (and P2), the step at which a renewal is `due`, the `gap` to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lilliput.core.random import generator
from lilliput.optim import pca
from lilliput.optim.projection import (
    Projection,
    Side,
    factor_shapes,
    factors,
    from_factors,
    gram,
    haar,
    low_rank_shape,
    overlap,
    power,
    side,
    svd,
    turn,
)  # fmt: skip
from lilliput.optim.rules import Options, Rule
from lilliput.optim.states import Layout, layout, opened, working_dtype

State = dict[str, Any]
NOT_YET, NEVER = -1, 2**62  # values of `due`


def learns(options: Options) -> bool:
    """Whether the projection is trained by online PCA."""
    return options["proj_type"] in pca.OPTIMIZERS


def seen_shape(shape: Sequence[int], options: Options) -> tuple[int, int]:
    """The shape of a gradient seen in the subspace."""
    return low_rank_shape(shape, _rank(shape, options), _side(shape, options))


def state_layout(shape: Sequence[int], options: Options, rule: Rule, dtype: torch.dtype) -> Layout:
    """Names, shapes and dtypes of all tensors that a projected m x n matrix keeps."""
    tensors = layout(rule.moments(seen_shape(shape, options), options), options["states"], dtype)
    P_shapes = factor_shapes(shape, _rank(shape, options), _side(shape, options))
    if options["proj_type"] != "seeded":
        tensors |= {name: (P_shape, dtype) for name, P_shape in P_shapes.items()}
    if learns(options):
        P_rule, constants = pca.OPTIMIZERS[options["proj_type"]]
        kind = constants.get("states", "float32")
        tensors |= layout(P_rule.moments(P_shapes["P"], constants), kind, dtype, prefix="P_")
    if options["update"] != "project":
        tensors["norm"] = ((), dtype)
    return tensors


def current(G_mn: Tensor, state: State, options: Options, rule: Rule, assigned: bool) -> Projection:
    """The projection to use now: the stored one, the one just `assigned` by hand, or a new one if that is due."""
    old = stored(G_mn, state, options)
    if old is not None and assigned:
        _check(G_mn, state, options)
        state["made"] = state["step"] if state["due"] == NOT_YET else state["made"]
        state["due"] = NEVER if learns(options) else state["step"] + state["gap"]
        return old
    if old is not None and state["step"] < state["due"]:
        return old
    if options["proj_type"] == "seeded":
        return _reseed(G_mn, old, state, options, rule)
    size = float(torch.linalg.vector_norm(G_mn))
    if size == 0 or not math.isfinite(size):  # nothing to see here: ask again at the next step
        if old is None:
            old = _draw(G_mn, state, options, -1)
            state.update(factors(old))
        return old
    old = None if state["due"] == NOT_YET else old  # never seen a gradient
    new = _fresh(G_mn, old, state, options)
    _replace(G_mn, new, old, state, options, rule)
    return new


def start(options: Options) -> State:
    """The whole numbers of a state before its first step: every key is there from then on, as checkpoints need it."""
    return {
        "due": NOT_YET,
        "made": NOT_YET,
        "gap": options["update_proj_gap"],
        **({"P_step": 0} if learns(options) else {}),
    }


def due(state: State, options: Options) -> bool:
    """Whether this step's gradient may change the subspace, so that what the old one sees of it would not do."""
    if options["proj_type"] == "seeded":
        return "P" in state or (options["rotate"] and state["step"] % options["update_proj_gap"] == 0)
    return "P" not in state or state["step"] >= state["due"]


def stored(G_mn: Tensor, state: State, options: Options) -> Projection | None:
    """The projection in the state, if there is one."""
    return from_factors(state["P"], state.get("P2"), _side(G_mn.shape, options)) if "P" in state else None


def learn_(G_mn: Tensor, R: Tensor, norm2: Tensor, state: State, options: Options, rule: Rule) -> None:
    """One step of online PCA on P, in place.  The gradient that P was made from does not also train it."""
    if state["due"] == NOT_YET or state["made"] == state["step"] - 1:
        return
    where = _side(G_mn.shape, options)
    projection = from_factors(state["P"], None, where)
    P_rule, constants = pca.OPTIMIZERS[options["proj_type"]]
    grad = pca.gradient(G_mn, R, projection, norm2, options["orthogonality"])
    lr = float(options["lr"]) / float(options["base_lr"]) / options["update_proj_gap"]
    state["P_step"] += 1
    before = state["P"].clone() if options["rotate"] else None
    with opened(state, P_rule.moments(tuple(grad.shape), constants), state["P_step"], prefix="P_") as moments:
        pca.step_(state["P"], grad, moments, state["P_step"], lr, options["proj_type"], options)
    if before is not None:
        _turn(G_mn, projection, from_factors(before, None, where), state, options, rule)


def _fresh(G_mn: Tensor, old: Projection | None, state: State, options: Options) -> Projection:
    if options["proj_type"] == "random":
        return _draw(G_mn, state, options, state["step"])
    where, G_mn = _side(G_mn.shape, options), G_mn.to(working_dtype(G_mn.dtype))
    if options["refresh"] == "svd":
        return svd(G_mn, options["rank"], where)
    return gram(G_mn, options["rank"], where) if old is None else power(G_mn, old)


def _replace(G_mn: Tensor, new: Projection, old: Projection | None, state: State, options: Options, rule: Rule) -> None:
    if old is not None:
        if options["rotate"]:
            _turn(G_mn, new, old, state, options, rule)
        if options["lazy"] is not None and overlap(new, old) >= options["lazy"]:
            state["gap"] *= 2
    state.update(factors(new))
    state["due"] = NEVER if learns(options) else state["step"] + state["gap"]
    state["made"] = state["step"]


def _reseed(G_mn: Tensor, old: Projection | None, state: State, options: Options, rule: Rule) -> Projection:
    count, since = divmod(state["step"], options["update_proj_gap"])
    new = _draw(G_mn, state, options, count)
    if options["rotate"] and (old is not None or (count and not since)):
        old = old or _draw(G_mn, state, options, count - 1)
        if not bool(G_mn.isfinite().all()):  # this step will be skipped
            return old
        _turn(G_mn, new, old, state, options, rule)
    state.pop("P", None), state.pop("P2", None)
    return new


def _draw(G_mn: Tensor, state: State, options: Options, count: int) -> Projection:
    like = torch.empty(0, dtype=working_dtype(G_mn.dtype), device=G_mn.device)
    g = generator("projection", options["seed"], state["index"], count)
    return haar(G_mn.shape, _rank(G_mn.shape, options), _side(G_mn.shape, options), g, like)


def _turn(G_mn: Tensor, new: Projection, old: Projection, state: State, options: Options, rule: Rule) -> None:
    if state["step"] == 0:  # no moments yet
        return
    with opened(state, rule.moments(seen_shape(G_mn.shape, options), options), state["step"]) as moments:
        rule.turn(moments, turn(new, old), state["step"], options)


def _check(G_mn: Tensor, state: State, options: Options) -> None:
    m, n = G_mn.shape
    for name, shape in factor_shapes((m, n), _rank((m, n), options), _side((m, n), options)).items():
        if name not in state or tuple(state[name].shape) != shape:
            got = tuple(state[name].shape) if name in state else None
            raise ValueError(f"{name} of shape {got} was assigned to a {m} x {n} matrix; its projection "
                             f"{options['proj_type']!r} of rank {options['rank']} needs {shape}")  # fmt: skip


def _rank(shape: Sequence[int], options: Options) -> int:
    """The rank of a matrix's subspace, which `official` lets exceed its smaller side."""
    return min(options["rank"], *shape)


def _side(shape: Sequence[int], options: Options) -> Side:
    m, n = shape
    return side(options["proj_type"], m, n)
