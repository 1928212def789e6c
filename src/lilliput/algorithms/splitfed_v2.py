"""SplitFed v2 (Thapa et al., AAAI 2022, section 3.3).  https://arxiv.org/abs/2004.12088

SplitFed v1 with a single server part, which takes a step on every batch of every client and is never averaged.  The
result depends on the order of the clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lilliput.algorithms.fedavg import advance, model_sums
from lilliput.algorithms.splitfed_v1 import SplitFedV1
from lilliput.algorithms.splitting.settings import check_order, devices, joined
from lilliput.core.fleet import Fleet
from lilliput.core.tree import Body
from lilliput.submodel import reduce


@dataclass(frozen=True)
class SplitFedV2(SplitFedV1):
    """Split learning with one server part for all clients: less memory on the server than SplitFed v1.

    order: sequential: one client's whole round after another, as published; interleaved: by (batch number, client id),
           so that clients work at the same time.
    """

    order: Literal["sequential", "interleaved"] = "sequential"

    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.order)
        if self.clip is not None and self.order != "sequential":
            raise ValueError(
                "clip needs the norm of both ends' gradients, and the one server must take its step before the next "
                f"client's turn; order={self.order} does not wait for it: use order=sequential, or no clip"
            )

    def init(self, task: Any) -> Body:
        return {**super().init(task), "server_opt": {}}

    def round(self, state: Body, fleet: Fleet) -> Body:
        cohort, server = fleet.sample(self.cohort), self.one_server(fleet, state)
        trained: list[int] = []
        for clients in [[c] for c in cohort] if self.order == "sequential" else [cohort]:
            trained += self.exchange(fleet, state, clients, dict.fromkeys(clients, server))
        own = devices(fleet.task, state)
        sums = reduce(joined(fleet.call(self.finish, to=trained)), **model_sums(self.combine, own))
        return self.moved(fleet.task, state, advance(self.combine, own, sums), server)
