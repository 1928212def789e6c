"""MOON (Li, He and Song, CVPR 2021, eq. 3-4).  https://arxiv.org/abs/2103.16257

loss = criterion + mu * l_con, l_con = -log exp(s(z, z_glob)/T) / (exp(s(z, z_glob)/T) + exp(s(z, z_prev)/T)), with s
the cosine, and z, z_glob and z_prev the features of the model in training, of the received model, and of the client's
previous model.  In its first round a client has no previous model and leaves out the term.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput.algorithms.fedavg import FedAvg, model_reply, train
from lilliput.core.fleet import Client, on_client
from lilliput.core.tree import Body, Tree, clone, shapes
from lilliput.tasks import frozen_norms
from lilliput.training.passes import Loss


@dataclass(frozen=True)
class Moon(FedAvg):
    """FedAvg with a contrastive loss: features stay near the global model's and away from the client's previous ones.

    mu:          weight of the contrastive term; the paper uses 5 on CIFAR-10 and 1 on CIFAR-100.  With 0: FedAvg.
    temperature: of the similarities.
    """

    mu: float = 1.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mu < 0 or self.temperature <= 0:
            raise ValueError(f"mu is {self.mu} and temperature {self.temperature}; need mu >= 0 and temperature > 0")

    @on_client(like={"delta": "params", "buffer_delta": "buffers"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        previous: Any = state.get("previous")
        # A rolling slice has other neurons than last round's model, whose features then mean nothing.
        if previous is None or shapes(previous["params"]) != shapes(msg["params"]) or not self.mu:
            params, state, stats = train(self, client, state, msg)
        else:
            with ExitStack() as stack:
                loss = self._contrast(client, msg, previous, stack)
                params, state, stats = train(self, client, state, msg, loss=loss)
        kept: Body = {"previous": {"params": clone(params), "buffers": stats.buffers}} if self.mu else {}
        return model_reply(msg, params, stats), {**state, **kept}

    def _contrast(self, client: Client, msg: Body, previous: Body, stack: ExitStack) -> Loss:
        task = client.task

        def teacher(role: str, params: Tree, buffers: Tree | None) -> nn.Module:
            model = task.resident(params, buffers, role, client.device).eval()
            if not buffers:
                stack.enter_context(frozen_norms(model))
            return model

        anchor = teacher("anchor", msg["params"], msg.get("buffers"))
        before = teacher("previous", previous["params"], previous["buffers"])

        def loss(model: nn.Module, batch: Any, context: Any) -> tuple[Tensor, dict[str, Tensor]]:
            outputs = task.with_features(model, batch)
            with torch.no_grad():
                others = [task.with_features(m, batch)["features"] for m in (anchor, before)]
            z = outputs["features"]
            similar = torch.stack([F.cosine_similarity(z, other, dim=-1) for other in others], 1) / self.temperature
            target = torch.zeros(len(similar), dtype=torch.int64, device=similar.device)
            contrast = F.cross_entropy(similar, target)
            return task.loss_of(outputs, batch) + self.mu * contrast, {"contrast": contrast.detach()}

        return loss
