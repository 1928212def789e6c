"""FedProx (Li et al., MLSys 2020, eq. 2).  https://arxiv.org/abs/1812.06127

Clients minimise F_i(w) + mu/2 |w - x|^2: every step is pulled towards the model that the client received.
"""

from __future__ import annotations

from dataclasses import dataclass

from lilliput.algorithms.fedavg import FedAvg, model_reply, train
from lilliput.core.fleet import Client, on_client
from lilliput.core.tree import Body
from lilliput.training.step import pull_to


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose clients stay near the model they received: for data that differ between clients.

    mu: strength of the pull; the paper tunes it among 0.001, 0.01, 0.1 and 1.  With 0 this is FedAvg.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mu < 0:
            raise ValueError(f"mu is {self.mu}; it must not be negative")

    @on_client(like={"delta": "params", "buffer_delta": "buffers"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        pull = [pull_to(msg["params"], self.mu)] if self.mu else []
        params, state, stats = train(self, client, state, msg, pull)
        return model_reply(msg, params, stats), state
