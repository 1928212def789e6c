"""The two bounds of every comparison: all data in one place, and every client alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lilliput.algorithms.fedavg import measured, train
from lilliput.core.fleet import Client, Fleet, Model, on_client
from lilliput.core.tree import Body
from lilliput.training.settings import Training


@dataclass(frozen=True)
class LocalOnly(Training):
    """Every client trains its own model on its own data, without exchange: shows what federated training gains.

    cohort: clients that train per round; None for all.
    """

    cohort: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer_state == "average":
            raise ValueError("local_only averages nothing; choose optimizer_state=reset or keep")

    ordered: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    def init(self, task: Any) -> Body:
        return task.init()

    def round(self, state: Body, fleet: Fleet) -> Body:
        chosen = fleet.sample(None if self.pooled else self.cohort)
        first = {c: {} if fleet.memory.get(c) else state for c in chosen}
        for reply in fleet.call(self.train, each=first):
            fleet.memory[reply.client] = {"started": True}
        return state

    @on_client
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        own = {name: msg.get(name) or state.get(name, {}) for name in ("params", "buffers")}
        params, state, stats = train(self, client, state, own)
        return {"metrics": measured(stats)}, {**state, "params": params, "buffers": stats.buffers}

    @on_client
    def read(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        return {name: state[name] for name in ("params", "buffers") if name in state}, state

    def models(self, state: Body, fleet: Fleet) -> dict[Any, Model]:
        """Each client's own model, under its id."""
        own = {reply.client: {**state, **reply.body} for reply in fleet.call(self.read)}
        return {c: Model(body["params"], buffers=body["buffers"]) for c, body in own.items()}


@dataclass(frozen=True)
class Centralized(LocalOnly):
    """Trains one model on everyone's data in one place: shows what federated training loses."""

    pooled: ClassVar[bool] = True

    def models(self, state: Body, fleet: Fleet) -> dict[Any, Model]:
        (model,) = super().models(state, fleet).values()
        return {"global": model}
