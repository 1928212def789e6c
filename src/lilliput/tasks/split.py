"""A model in two parts, the device's and the server's, and perhaps an auxiliary head that stands in for the server's.

The task is that of the whole model, so that every other method trains it too; split methods ask it for its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lilliput.tasks.supervised import Supervised, cross_entropy
from lilliput.tree import Body


class Chain(nn.Module):
    """Modules one after another; the first takes the inputs, each further one the output before it."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *rest = self.children()
        out = first(*args, **kwargs)
        for part in rest:
            out = part(out)
        return out


class Split(Supervised):
    """Supervised learning with a model that is cut in two; parameters are called `client.…` and `server.…`.

    client:    from inputs to the activations at the cut [examples, ...], the only thing of it that travels.
    server:    from the activations to the model's output.
    auxiliary: likewise, but small: it gives a device gradients without asking the server.  Its parameters are called
               `auxiliary.…` and are no part of the whole model.
    loss, metrics: as for `Supervised`.

    Each part is a `Supervised` task of its own: `client_part`; `server_part` and `auxiliary_part`, whose batches are
    (activations, labels).
    """

    def __init__(
        self,
        client: nn.Module,
        server: nn.Module,
        auxiliary: nn.Module | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        metrics: Mapping[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
        tokens_per_example: int | None = None,
    ):
        super().__init__(Chain(client=client, server=server), loss, metrics, tokens_per_example=tokens_per_example)
        self.client_part = Supervised(Chain(client=client), loss, {})
        self.server_part = Supervised(Chain(server=server), loss, {})
        self.auxiliary_part = None if auxiliary is None else Supervised(Chain(auxiliary=auxiliary), loss, {})
        # What is under way between the calls of a round, by client: its epoch, and its part in training.
        self.streams: dict[int, Any] = {}
        self.halves: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "streams": {}, "halves": {}}


def portion(part: Supervised, state: Body) -> Body:
    """What of a state of the whole model is a part's: `params`, and `buffers` where there are any."""
    names = part.model.state_dict().keys()
    own = {kind: {n: x for n, x in state.get(kind, {}).items() if n in names} for kind in ("params", "buffers")}
    return {kind: tree for kind, tree in own.items() if tree or kind == "params"}
