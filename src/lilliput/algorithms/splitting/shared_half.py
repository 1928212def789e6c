"""The baseline that the FSL-SAGE paper (ICML 2025) calls FedAvg, to replay its numbers.

The clients' models share one server half, which the program forgot to copy: the clients train it in turn, and it is
never averaged.  The real FedAvg, with a copy for each client, is `FedAvg`; it equals SplitFed v1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lilliput.algorithms.fedavg import FedAvg, advance, model_sums
from lilliput.core.fleet import Fleet
from lilliput.core.tree import Body
from lilliput.splitter.task import portion
from lilliput.submodel import reduce, weighted_mean


@dataclass(frozen=True)
class SharedHalfFedAvg(FedAvg):
    """FedAvg on a split task with one server half for all clients.  Only to replay published numbers."""

    ordered: ClassVar[bool] = True

    def round(self, state: Body, fleet: Fleet) -> Body:
        half, replies = portion(fleet.task.server_part, state), []
        for c in fleet.sample(self.cohort):
            now = {kind: state[kind] | half.get(kind, {}) for kind in ("params", "buffers") if state.get(kind)}
            for reply in fleet.call(self.train, now, to=[c]):
                of = {"delta": "params", "buffer_delta": "buffers"}
                own = {key: {n: reply.body[key][n] for n in half[of[key]]} for key in of if of[key] in half}
                half = advance(weighted_mean(), half, own)
                replies.append(reply)
        mean = advance(self.combine, state, reduce(replies, **model_sums(self.combine, state)))
        return {**state, **{kind: tree | half.get(kind, {}) for kind, tree in mean.items()}}
