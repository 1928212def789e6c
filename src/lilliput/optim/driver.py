"""The driver of every subspace optimizer: which parameter is due for what, and where its state lives.

Projected parameters keep `P` (and `P2` for full), their moments in the subspace and, for online PCA, the moments of P
itself under `P_`.  All state is plain tensors and whole numbers.  A parameter whose gradient is not finite is left
alone for that step and counted in its group's `skipped`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.core.registry import nearest
from lilliput.lean.policy import fast
from lilliput.optim import dense, options, sharded, subspace
from lilliput.optim.groups import split
from lilliput.optim.projection import Projection, project
from lilliput.optim.rules import Rule
from lilliput.optim.states import Layout, allocate, layout, moved, opened, working_dtype
from lilliput.optim.update import apply_, product_dtype

Group = dict[str, Any]


@dataclass
class Work:
    """One projected parameter in the middle of a step; G is missing where only R was accumulated."""

    p: Tensor
    whole: Tensor  # the weight to change: p itself, or what was gathered of a sharded one
    G: Tensor | None
    R: Tensor
    projection: Projection
    probe: Tensor  # a scalar that is not finite if the gradient is not; |G|^2 for online PCA


def _closest(unknown: Iterable[str]) -> str:
    hints = (nearest(name, options.DEFAULTS) for name in sorted(unknown))
    return "".join(f"{hint} " for hint in hints if hint.startswith("did you mean"))


def matrix(x: Tensor) -> Tensor:
    """A weight or gradient as (out, in): convolutions as out x (in k k).  A view where the memory allows it."""
    return x.flatten(1)


class SubspaceOptimizer(torch.optim.Optimizer):
    """Common to all: parameter groups with a `rank` are projected, the others get the same rule in full."""

    rule: Rule

    def __init__(self, params: Any, subspace: dict[str, Any], **defaults: Any) -> None:
        """subspace: `rank`, `guard` and the options of projected groups; defaults: the rule's own, for all groups."""
        guard = subspace.pop("guard", True)
        defaults = {name: tuple(x) if isinstance(x, list) else x for name, x in defaults.items()}
        unknown = subspace.keys() - {"rank", *options.DEFAULTS}
        if unknown:
            raise TypeError(
                f"unknown options {sorted(unknown)}; {_closest(unknown)}a projection takes rank, "
                f"{', '.join(options.DEFAULTS)}"
            )
        self._rank = subspace.pop("rank", None)
        self._given = subspace
        self._seen: dict[Tensor, list[tuple[Tensor, int]]] = {}
        if isinstance(params, nn.Module):
            raise ValueError(f"a {type(params).__name__} is a model; give optim.param_groups(model, rank), or "
                             "model.parameters() to project nothing")  # fmt: skip
        if self._rank is not None:
            options.check_rank(self._rank)
        params = list(params)
        if any(isinstance(group, dict) and "rank" in group for group in params):
            self._rank = None  # the groups say themselves what is projected
        super().__init__(params, {**defaults, "rule": self.rule.name, "guard": guard, "skipped": 0})
        self._say_what_is_projected(plain=not any(isinstance(group, dict) for group in params))

    def _say_what_is_projected(self, plain: bool) -> None:
        """Parameters alone do not tell an embedding or an output head from a layer."""
        projected = [p for group in self.param_groups if options.ranked(group) for p in group["params"]]
        if plain and len(projected) > 1:
            largest = max(projected, key=Tensor.numel)
            warnings.warn(
                f"rank={self._rank} projects all {len(projected)} matrices above it, embeddings and output head too if "
                f"there are any (the largest is {tuple(largest.shape)}); optim.param_groups(model, "
                f"rank={self._rank}) takes the layers alone", stacklevel=4,
            )  # fmt: skip

    def add_param_group(self, group: Group) -> None:
        """Add a group; with a rank given to the constructor, its matrices above that rank and the rest part ways."""
        for part in [group] if self._rank is None or "rank" in group else split(group, self._rank):
            official = self.defaults["compat"] == "official"
            if options.ranked(part):
                options.complete(part, self._given, official)
            options.check_names(part, self.defaults)
            merged = {**self.defaults, **part}
            options.check(merged)
            part.setdefault("base_lr", self.defaults["lr"] if official else merged["lr"])
            super().add_param_group(part)
            for p in self.param_groups[-1]["params"]:
                sharded.check(p)
            options.check_params(self.param_groups[-1], self.rule.sign)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None or sharded.check(p)]
            for some in self._portions(params):
                self.update(some, [p.grad for p in some], group)  # type: ignore[misc]
        return loss

    @staticmethod
    def _portions(params: list[Tensor]) -> Iterable[list[Tensor]]:
        # On a CPU one at a time: scratch stays in cache.  Elsewhere all of a device: one question to it per group.
        alike: dict[Any, list[Tensor]] = {}
        for p in params:
            place: Any = (p.device, sharded.is_sharded(p)) if p.device.type != "cpu" else p
            alike.setdefault(place, []).append(p)
        return alike.values()

    @torch.no_grad()
    def update(self, params: Sequence[Tensor], grads: Sequence[Tensor], group: Group) -> None:
        """Step these parameters of a group on these gradients (each of its parameter's shape)."""
        for p, grad in zip(params, grads, strict=True):
            if grad.is_sparse or grad.device != p.device:
                raise ValueError(f"the gradient of a {tuple(p.shape)} weight on {p.device} is sparse or on "
                                 f"{grad.device}; use dense gradients on the weight's device")  # fmt: skip
        if not params:
            return
        if sharded.is_sharded(params[0]):
            sharded.update(self, params, grads, group)
            return
        with fast(params[0].device):
            if options.ranked(group):
                self.finish([self.prepare(p, grad, group) for p, grad in zip(params, grads, strict=True)], group)
            else:
                self._ordinary(params, grads, group)

    def prepare(self, p: Tensor, grad: Tensor, group: Group, whole: Tensor | None = None) -> Work:
        """See a gradient in the subspace, after a refresh of that where it is due; `whole` stands for a sharded p."""
        G = matrix(grad)
        state = self.ready(p, group)
        projection = subspace.current(G, state, group, self.rule, self._assigned(p))
        self._remember(p)
        R = project(G, projection, product_dtype(group))
        probe = torch.linalg.vector_norm(G, dtype=R.dtype).square() if subspace.learns(group) else R.sum()
        return Work(p, p if whole is None else whole, G, R, projection, probe)

    def finish(self, works: list[Work], group: Group) -> None:
        """Move weights, moments and learning projections, except where a gradient was not finite."""
        for work, probe in zip(works, torch.stack([w.probe for w in works]).tolist(), strict=True):
            if math.isfinite(probe):
                self._apply(work, group)
                if subspace.learns(group) and probe > 0 and work.G is not None:
                    subspace.learn_(work.G, work.R, work.probe, self.state[work.p], group, self.rule)
                    self._remember(work.p)
            else:
                group["skipped"] += 1

    def _apply(self, work: Work, group: Group) -> None:
        state, W = self.state[work.p], matrix(work.whole)
        state["step"] += 1
        step = state["step"]
        lr = self.rule.rate(W, step, float(group["lr"]), group)
        with opened(state, self.rule.moments(tuple(work.R.shape), group), step) as moments:
            U = self.rule.direction(work.R, moments, step, lr, group)
        apply_(W, work.G, work.R, U, work.projection, lr, state.get("norm"), self.rule.sign, group)
        if W.data_ptr() != work.whole.data_ptr():  # a weight whose memory order has no matrix view
            work.whole.copy_(W.view(work.whole.shape))

    def _ordinary(self, params: Sequence[Tensor], grads: Sequence[Tensor], group: Group) -> None:
        states = [self.ready(p, group) for p in params]
        good = list(range(len(params)))
        if group["guard"]:
            probes = torch.stack([grad.sum(dtype=working_dtype(grad.dtype)) for grad in grads]).tolist()
            good = [i for i in good if math.isfinite(probes[i])]
            group["skipped"] += len(params) - len(good)
        for i in good:
            states[i]["step"] += 1
        dense.step_([params[i] for i in good], [grads[i] for i in good], [states[i] for i in good], self.rule, group)

    def layout(self, p: Tensor, group: Group) -> Layout:
        """Names, shapes and dtypes of the state tensors that a parameter of this group keeps."""
        dtype = working_dtype(p.dtype)
        if not options.ranked(group):
            return layout(self.rule.moments(tuple(p.shape), group), group["states"], dtype)
        return subspace.state_layout(options.matrix_shape(p), group, self.rule, dtype)

    def ready(self, p: Tensor, group: Group) -> dict[str, Any]:
        """The state of a parameter, made at its first step; a P assigned before that stays."""
        state = self.state[p]
        if any(isinstance(x, Tensor) and x.device != p.device for x in state.values()):  # the model was moved
            state.update(moved(state, p.device))
            self._remember(p)
        if "step" not in state:
            tensors = {name: shape for name, shape in self.layout(p, group).items() if name not in ("P", "P2")}
            state.update(allocate(tensors, p.device), step=0)
            if options.ranked(group):
                state.update(subspace.start(group), index=self.index(p))
        return state

    def index(self, p: Tensor) -> int:
        """The position of a parameter among all of them."""
        return next(i for i, q in enumerate(q for group in self.param_groups for q in group["params"]) if q is p)

    def _assigned(self, p: Tensor) -> bool:
        now, before = self._factors(p), self._seen.get(p, [])
        return len(now) != len(before) or any(
            a is not b or version != v for (a, version), (b, v) in zip(now, before, strict=True)
        )

    def _remember(self, p: Tensor) -> None:
        self._seen[p] = self._factors(p)

    def _factors(self, p: Tensor) -> list[tuple[Tensor, int]]:
        state = self.state[p]
        return [(state[name], state[name]._version) for name in ("P", "P2") if name in state]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_rank", None)
        self.__dict__.setdefault("_given", {})
        self._seen = {}
        for p in self.state:
            self._remember(p)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, as of any torch optimizer; of sharded weights whole ones, by a collective call."""
        packed = super().state_dict()
        numbered = enumerate((p, group) for group in self.param_groups for p in group["params"])
        for i, (p, group) in numbered:
            if sharded.is_sharded(p):
                state = sharded.gathered(self, p, group)
                packed["state"].update({i: state} if state else {})
        return packed

    def _matched(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any], Group]]:
        """Each parameter with its saved state and its group.  Raises ValueError, naming the first difference."""
        groups, saved = self.param_groups, state_dict["param_groups"]
        sizes = [[len(group["params"]) for group in both] for both in (groups, saved)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the checkpoint has groups of {sizes[1]} parameters, this optimizer of {sizes[0]}: another model"
            )
        matched = []
        for group, saved_group in zip(groups, saved, strict=True):
            _check_same_kind(group, saved_group)
            for p, key in zip(group["params"], saved_group["params"], strict=True):
                if key in state_dict["state"]:
                    state = state_dict["state"][key]
                    _check_fits(p, state, self.layout(p, {**group, **saved_group}), key)
                    matched.append((p, state, group))
        return matched

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a checkpoint of the same optimizer and model, on this model's devices, dtypes kept.

        Raises ValueError for another optimizer's or another model's, before anything has changed.
        """
        pairs = self._matched(state_dict)
        super().load_state_dict(state_dict)
        # The base class would turn every state into its weight's dtype: P into bfloat16, 8-bit codes into floats.
        for p, saved, group in pairs:
            shard = sharded.is_sharded(p)
            self.state[p] = sharded.local_state(self, p, saved, group) if shard else moved(saved, p.device)
        self.__setstate__({})


def _check_same_kind(group: Group, saved: Group) -> None:
    for name in ("rule", "rank", "proj_type", "states"):
        if group.get(name) != saved.get(name):
            raise ValueError(f"the checkpoint was made with {name}={saved.get(name)!r}, this optimizer has "
                             f"{group.get(name)!r}; build it with the options of the run that saved it")  # fmt: skip


def _check_fits(p: Tensor, state: dict[str, Any], layout: Layout, key: object) -> None:
    saved = {name: (tuple(x.shape), x.dtype) for name, x in state.items() if isinstance(x, Tensor)}
    optional = {"P", "P2"}  # absent before the first usable gradient; present where a seeded one was assigned by hand
    for name in (saved.keys() | layout.keys()) - (optional if saved.keys() ^ layout.keys() else set()):
        if saved.get(name) != layout.get(name):
            raise ValueError(f"state {name!r} of parameter {key} is {saved.get(name)} in the checkpoint, but a weight "
                f"of shape {tuple(p.shape)} keeps {layout.get(name)}: another model or optimizer")  # fmt: skip
