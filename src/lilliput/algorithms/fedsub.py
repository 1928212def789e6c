"""FedSub: subspace federated learning with low-dimensional dual variables (Zhang, Xu, Yuan, 2025).

https://arxiv.org/abs/2509.05213.  Client i trains b in W = x + b P.  Its dual mu_i, in units of a gradient, cancels
what its data would drift.  With a_i the weight of a gradient held constant over its round (the number of its SGD steps;
under momentum more) and p_i that of the client in the mean:

    b_i = local steps on dL_i/db + mu_i, from b = 0
    u_i = b_i / (lr a_i)                            goes up;  ubar = sum_i p_i u_i
    x+  = x + lr (sum_i p_i a_i) ubar P             mu_i+ = mu_i + u_i - ubar

The sum of all p_i mu_i stays zero, and the only fixed point is the optimum, under momentum and unequal steps too.  P,
the same for all, comes from a seed and changes every few rounds; mu is then taken to the new basis.  With P = I this is
dual averaging in full dimension; without duals b goes up as it is, as in FedAvg.

An adaptive optimizer has no a_i.  There -u_i is the mean of the gradients that its steps were given, mu_i among them,
as of plain SGD it is as well; it goes up beside b_i, and x+ = x + (mean_i b_i) P.

As published (`official`), lambda_i = -lr a mu_i, in units of b, moves b beside the optimizer, by -lambda_i / tau in
each of tau steps, and lambda_i+ = lambda_i + b_i - mean_j b_j.

Ours: the current P wherever b is folded in (the published program keeps the first); ordinary parameters are averaged;
and gradients are not scaled by r / m.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lilliput.algorithms.fedavg import model_reply, model_sums, start
from lilliput.algorithms.spaces import Bases, Spaces, forgotten, spaces_of
from lilliput.core.fleet import Client, Fleet, Model, on_client
from lilliput.core.tree import Body, Tree, add, clone, size
from lilliput.optim.factory import projects
from lilliput.submodel import Combine, InCo, Mean, reduce, weighted_mean
from lilliput.subspace import PROJECTIONS, leading
from lilliput.subspace.dual import learnt, move_, rotated, within
from lilliput.tasks.supervised import to_device
from lilliput.training.fit import Stats, fit
from lilliput.training.settings import Training
from lilliput.training.step import Correction, MeanGradient, giving, shift


@dataclass(frozen=True)
class FedSub(Training):
    """Clients train their layers in a subspace, and carry a dual variable from round to round.

    cohort, combine: as for FedAvg.
    rank:       rows of P; a share of each layer's width if it is at most 1 and no int; or by target, {q_proj: 64}.
    targets:    names of layers, such as [q_proj,v_proj], or patterns; None takes all linear and convolutional ones but
                the head.
    skip:       parts of names ([0] is layer 0), whole names or patterns of what stays ordinary.
    projection: cd (signed coordinates), rd (Gaussian), ss (orthonormal), idx (the identity), or svd of a sketch of the
                clients' dense gradients, which goes up and comes down whenever P changes.
    refresh:    rounds between two P.
    dual:       rotated: in the subspace, as published, where a new P loses what it does not span; full: kept on the
                device in full size, so that nothing is lost and nothing more is sent; none.
    ordinary:   all other parameters are averaged, frozen, or (as published) each client's own.
    downlink:   means: a device keeps the model and is sent the changes that it missed, or the model where that is
                smaller; model: always the model, and the device keeps none.
    along:      what of a convolution is compressed: a whole filter, or (under official by default) its kernel's width.
    stale_projection: fold b in by the first P for ever, as the published program does.
    compat="official": gradients of b scaled by rank / rows, weight decay within; layers of one width share P; duals
                move b beside the optimizer (but do not gather in the momentum, as they do there).
    """

    cohort: int | None = None
    combine: Combine = weighted_mean()
    compat: Literal["official"] | None = None
    rank: Any = 0.25
    targets: Any = None
    skip: Any = ()
    projection: Any = "cd"
    refresh: int = 1
    dual: Literal["rotated", "full", "none"] = "rotated"
    ordinary: Literal["average", "frozen", "local"] = "average"
    downlink: Literal["means", "model"] = "means"
    along: Literal["filter", "width"] | None = None
    stale_projection: bool = False

    ordered: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.combine, InCo):
            raise ValueError(
                "InCo mixes changes of whole layers, and FedSub's are coordinates in subspaces; leave combine=inco out"
            )
        if self.local_steps == 0:
            raise ValueError("local_steps is 0; a round has 1 or more steps, over which the dual is spread")
        if self.refresh < 1:
            raise ValueError(f"refresh is {self.refresh}; P changes every 1 or more rounds")
        if not callable(self.projection) and self.projection not in PROJECTIONS:
            raise ValueError(f"projection is {self.projection!r}; choose one of {', '.join(PROJECTIONS)}")
        if self.stale_projection and self.projection == "svd":
            raise ValueError("stale_projection is for projections from a seed; choose cd, rd or ss")
        if projects(self.optimizer, self.optimizer_options):
            name = getattr(self.optimizer, "__name__", self.optimizer)
            warnings.warn(
                f"optimizer={name} projects nothing of layers in subspaces: b is small already and stepped whole, so "
                "that adamw (for galore_adamw) needs no more memory there", stacklevel=3,
            )  # fmt: skip
        if self.optimizer_state == "average":
            raise ValueError("optimizer_state=average is for subspace optimizers; choose reset or keep")

    def init(self, task: Any) -> Body:
        self.spaces(task)  # refuses what does not fit before anything is sent
        return {**start(self, task), "means": {}}

    def spaces(self, task: Any) -> Spaces:
        """The task's layers in subspaces."""
        official = self.compat == "official"
        return spaces_of(
            task, self.projection, official, self.ordinary == "frozen", targets=self.targets, skip=self.skip,
            rank=self.rank, along=self.along or ("width" if official else "filter"),
        )  # fmt: skip

    def epoch(self, round: int) -> int:
        """How often P has changed before a round trains."""
        epoch, late = divmod(round - 1, self.refresh)
        return 0 if self.stale_projection and late else epoch

    def folds(self, round: int) -> int:
        """The epoch whose P folds a round's b in."""
        return 0 if self.stale_projection else self.epoch(round)

    @property
    def settles(self) -> bool:
        """Whether a device has anything to do once the mean is known."""
        return self.dual != "none" or self.downlink == "means" or self.ordinary == "local"

    @property
    def inside(self) -> bool:
        """Whether duals are part of the gradient, and in its units."""
        return self.dual != "none" and self.compat is None

    @property
    def of_b(self) -> bool:
        """Whether duals have the units of b, as published."""
        return self.compat == "official"

    @property
    def weighs(self) -> bool:
        """Whether u is found as b over the optimizer's weight of a constant gradient."""
        sgd = self.optimizer == "sgd" or getattr(self.optimizer, "__module__", "") == "torch.optim.sgd"
        return self.inside and sgd and not self.optimizer_options.get("maximize")

    @property
    def measures(self) -> bool:
        """Whether u is measured, as of an adaptive optimizer, which has no such weight."""
        return self.inside and not self.weighs

    # The server's half.

    def round(self, state: Body, fleet: Fleet) -> Body:
        spaces, cohort = self.spaces(fleet.task), fleet.sample(self.cohort)
        down: Body = {"buffers": state["buffers"]} if state.get("buffers") else {}
        each = {c: self._behind(spaces, state, fleet, c) for c in cohort}
        if self.projection == "svd":
            state, each = self._projected(spaces, state, fleet, each)
        up = self._travels(spaces, state["params"])
        bases = spaces.bases(fleet.seed, self.folds(fleet.round), state.get("rows"))
        sizes: dict[str, Any] = {"rate": None} if self.inside else {}
        if self.measures:
            sizes["u"] = spaces.zeros(state["params"])
        like = {"delta": up, **{key: float if x is None else x for key, x in sizes.items()}}
        replies = fleet.call(self.train, down, each=each, like=like)
        more = {key: self.combine.over(x) for key, x in sizes.items()}
        sums = reduce(replies, **model_sums(self.combine, {**state, "params": up}), **more)
        step = sums.get("rate", 1.0)
        far = step if self.weighs else 1.0
        mean: Tree = {n: x * far if n.removesuffix(".b") in spaces.forms else x for n, x in sums["delta"].items()}
        after: Body = {**state, "params": spaces.moved(state["params"], mean, bases)}
        if "buffer_delta" in sums:
            after["buffers"] = add(state["buffers"], sums["buffer_delta"])
        if self.settles:
            told = {"mean": mean, "step": step, **({"u": sums["u"]} if "u" in sums else {})}
            for reply in fleet.call(self.settle, told, to=cohort):
                fleet.memory[reply.client] = {"round": fleet.round, "epoch": self.epoch(fleet.round)}
        return {**after, "means": self._remembered(state, mean, fleet, cohort)}

    def models(self, state: Body, fleet: Fleet) -> dict[str, Model]:
        return {"global": Model(state["params"], buffers=state.get("buffers"))}

    def _travels(self, spaces: Spaces, params: Tree) -> Tree:
        """Zeros in the names and shapes of what goes up: b, and the ordinary parameters where they are averaged."""
        return {**spaces.zeros(params), **(spaces.ordinary(params) if self.ordinary == "average" else {})}

    def _behind(self, spaces: Spaces, state: Body, fleet: Fleet, c: int) -> Body:
        """What a client lacks of the model: nothing, the means that it missed, or the model where that is smaller."""
        whole: Body = {"params": state["params"]}
        memory = fleet.memory.get(c) if self.downlink == "means" else None
        if memory is None:
            return whole
        missed = range(memory["round"] + 1, fleet.round)
        available = all(str(t) in state["means"] for t in missed)
        if missed and self.projection == "svd":  # whoever missed a P cannot fold in by it
            available = available and self.epoch(missed[-1]) == memory["epoch"]
        if not available:
            return whole
        body: Body = {"since": memory["round"]}
        if missed:
            body["missed"] = {str(t): state["means"][str(t)] for t in missed}
            body["ordinary"] = spaces.ordinary(state["params"]) if self.ordinary == "average" else {}
        return body if size(body) < size(whole) else whole

    def _remembered(self, state: Body, mean: Tree, fleet: Fleet, cohort: list[int]) -> Body:
        """The newest means of b that together are smaller than the model, where a client may miss one."""
        if self.downlink != "means" or len(cohort) == len(fleet.clients):
            return {}
        means = {**state["means"], str(fleet.round): {name: x for name, x in mean.items() if name.endswith(".b")}}
        while size(means) > size(state["params"]):
            del means[next(iter(means))]
        return means

    def _projected(
        self, spaces: Spaces, state: Body, fleet: Fleet, each: dict[int, Body]
    ) -> tuple[Body, dict[int, Body]]:
        """The state with the rows of P, new ones where they are due, and what goes to each client, they included."""
        if (fleet.round - 1) % self.refresh == 0:
            like = {layer: torch.zeros(spaces.sketch_shape(layer)) for layer in spaces.forms}
            replies = fleet.call(self.sketch, each=each, like={"sketch": like})
            mean: Tree = reduce(replies, sketch=Mean("labels").over(like))["sketch"]
            state = {**state, "rows": {n: leading(x, spaces.ranks[n]).dense() for n, x in mean.items()}}
            each = {c: {} for c in each}  # they have the model now
        now, rows = self.epoch(fleet.round), {"rows": state["rows"]}
        has_rows = {c: fleet.memory.get(c, {}).get("epoch") == now for c in each}
        return state, {c: body if has_rows[c] else {**body, **rows} for c, body in each.items()}

    # The device's half.

    @on_client
    def sketch(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """The sketch of each layer's dense gradient on one batch."""
        spaces, state = self.spaces(client.task), self._caught_up(client, state, msg)
        model = client.task.resident(state["params"], None, "train", client.device)
        batch = to_device(next(client.data.epoch(client.generator("shuffle", 0))), client.device, model)
        return {"sketch": spaces.sketches(model, client.task, batch, client.seed, client.round, "sketch")}, state

    @on_client(like={"buffer_delta": "buffers"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """tau steps in the subspace; u or b or both, and the change of the ordinary parameters, go up."""
        spaces, state = self.spaces(client.task), self._caught_up(client, state, msg)
        epoch, rows = self.epoch(client.round), msg.get("rows", state.get("rows"))
        bases = spaces.bases(client.seed, epoch, rows)
        dual = self._dual(spaces, state, client, bases)
        ordinary = {} if self.ordinary == "frozen" else spaces.ordinary(state["params"])
        trained = {**spaces.zeros(state["params"]), **ordinary}
        module = spaces.resident(trained, state["params"], bases, client.device)
        opt = state.get("opt")
        if opt and state["epoch"] != epoch and self.projection != "idx":  # of b it remembers what was in another basis
            names = [n for n, p in module.named_parameters() if p.requires_grad and n in trained]
            opt = forgotten(opt, [i for i, name in enumerate(names) if name.endswith(".b")])
        buffers: Any = msg.get("buffers")
        if self.buffers == "local":
            buffers = state.get("buffers") or client.task.init()["buffers"]
        official, seen = self.compat == "official", MeanGradient(dual)
        corrections = [_published(spaces, self.weight_decay)] if official else [shift(dual)] if self.inside else []
        after, opt, stats = fit(
            replace(client, task=spaces.task), trained, opt, buffers=buffers,
            after_step=self._displace(client, dual) if official else None,
            config=replace(self, weight_decay=0.0) if official else self,
            corrections=[*corrections, seen] if self.measures else corrections,
        )  # fmt: skip
        up = model_reply({**msg, "params": trained}, after, stats)
        change: Tree = up["delta"]
        u, rate = self._learnt(client, {name: change[name] for name in dual}, dual, stats, seen)
        if self.weighs:
            up["rate"], change = rate, {**change, **u}
        if self.measures:
            up["rate"], up["u"] = rate, u
        up["delta"] = {name: change[name] for name in self._travels(spaces, state["params"])}
        new: Body = {"u": u, "epoch": epoch, "opt": opt, "rows": rows, "buffers": stats.buffers}
        if self.ordinary == "local":
            new["moved"] = {name: change[name] for name in ordinary}
        if self.dual == "rotated":
            new["dual"] = dual
        state = {**state, **new}
        return up, state if self.settles else {"epoch": epoch, **self._kept(state)}

    def _learnt(self, client: Client, b: Tree, dual: Tree, stats: Stats, seen: MeanGradient) -> tuple[Tree, float]:
        """u by layer, and how far a step along it goes: 0 for a client that took none; its own gradient counts as 0."""
        if not self.inside:
            return b, 1.0
        if self.weighs:
            rate = self.lr_at(client.round, client.rounds) * stats.weights[next(iter(b))]
            return {n: b[n] / rate if rate else learnt(None, mu) for n, mu in dual.items()}, rate
        means = seen.result()
        return {n: learnt(means.get(n), mu).to(mu) for n, mu in dual.items()}, float(stats.steps > 0)

    @on_client
    def settle(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        """The dual moves by how far u was from the mean, and the model as the server's did."""
        spaces, mean = self.spaces(client.task), msg["mean"]
        after: Body = {"round": client.round, "epoch": self.folds(client.round), **self._kept(state)}
        if self.dual != "none":
            after["dual"] = self._moved_dual(spaces, client, state, msg)
        local = spaces.ordinary(state["params"]) if self.ordinary == "local" else {}
        change = {name: state["moved"][name] for name in local}
        if self.downlink == "means":
            folds = spaces.bases(client.seed, self.folds(client.round), state["rows"])
            after["params"] = spaces.moved(state["params"], {**mean, **change}, folds)
        elif local:
            after["params"] = add(local, change)
        return {}, after

    def _moved_dual(self, spaces: Spaces, client: Client, state: Body, msg: Body) -> Tree:
        """The client's dual after the round; of rounds in which nobody took a step, nobody learns anything."""
        u, step = state["u"], msg["step"]
        ubar: Tree = (msg.get("u") or {n: msg["mean"][n] / step for n in u}) if step else u
        if self.dual == "rotated":
            return {n: move_(mu, u[n], ubar[n]) for n, mu in clone(state["dual"]).items()}
        bases = spaces.bases(client.seed, state["epoch"], state["rows"])
        dual = clone(state["dual"]) if state.get("dual") else _no_duals(spaces, state["params"])
        return {n: move_(mu, u[n], ubar[n], bases[n.removesuffix(".b")], self.of_b) for n, mu in dual.items()}

    def _kept(self, state: Body) -> Body:
        """What of a device's state outlasts a round as it is."""
        names = ["opt", "rows", *(["buffers"] if self.buffers == "local" else [])]
        return {name: state[name] for name in names if state.get(name)}

    def _caught_up(self, client: Client, state: Body, msg: Body) -> Body:
        """The client's state with the model that the round starts from."""
        spaces = self.spaces(client.task)
        if "params" in msg:
            local = spaces.ordinary(state["params"]) if self.ordinary == "local" and "params" in state else {}
            return {**state, "params": {**msg["params"], **local}}
        if "since" not in msg:
            return state
        if state.get("round") != msg["since"]:
            raise ValueError(
                f"the model here is of round {state.get('round')}, and what was sent goes on from round "
                f"{msg['since']}; the server must send the model"
            )
        params = state["params"]
        for t, mean in msg.get("missed", {}).items():
            params = spaces.moved(params, mean, spaces.bases(client.seed, self.folds(int(t)), state.get("rows")))
        return {**state, "params": {**params, **msg.get("ordinary", {})}}

    def _dual(self, spaces: Spaces, state: Body, client: Client, bases: Bases) -> Tree:
        """The client's dual in the coordinates of these bases; zeros at first."""
        dual: Tree = state.get("dual") or {}
        if not dual:
            return spaces.zeros(state["params"])
        new = {n: bases[n.removesuffix(".b")] for n in dual}
        if self.dual == "full":
            return {n: within(x, new[n], self.of_b) for n, x in dual.items()}
        if state["epoch"] == self.epoch(client.round):
            return dual
        old = spaces.bases(client.seed, state["epoch"], state.get("rows"))
        return {n: rotated(x, old[n.removesuffix(".b")], new[n], self.of_b) for n, x in dual.items()}

    def _displace(self, client: Client, dual: Tree) -> Callable[[nn.Module], None]:
        """After each of the round's tau steps, move b by -dual / tau."""
        steps = self.local_steps if self.local_steps is not None else self.local_epochs * len(client.data)
        moves = {name: x.to(client.device) for name, x in dual.items()}

        def after_step(model: nn.Module) -> None:
            with torch.no_grad():
                torch._foreach_sub_(
                    [model.get_parameter(name) for name in moves], list(moves.values()), alpha=1 / steps
                )

        return after_step


def _no_duals(spaces: Spaces, params: Tree) -> Tree:
    """Duals of zeros, in full size."""
    weights = {n: form.matrix(params[f"{n}.weight"]) for n, form in spaces.forms.items()}
    return {f"{n}.b": w.new_zeros(w.shape) for n, w in weights.items()}


def _published(spaces: Spaces, weight_decay: float) -> Correction:
    """g + wd w; of b, times rank / rows (of a convolution along its kernel's width: rank / width), as published."""
    factors = {
        f"{n}.b": spaces.ranks[n] / (form.width if form.kind == "width" else form.rows[0])
        for n, form in spaces.forms.items()
    }

    def correct(names: Any, params: list[Tensor], grads: list[Tensor]) -> None:
        torch._foreach_add_(grads, params, alpha=weight_decay)
        for name, grad in zip(names, grads, strict=True):
            grad.mul_(factors.get(name, 1.0))

    return giving((), correct)
