"""A model in parts, the device's and the server's, and perhaps an auxiliary head that stands in for the server's.

The task is that of the whole model, so that every other method trains it too; split methods ask it for its parts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from lilliput.core.tree import Body
from lilliput.splitter.cutting import split
from lilliput.splitter.heads import auxiliary as derived_head
from lilliput.splitter.heads import check_auxiliary
from lilliput.tasks.supervised import Supervised, cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


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

    client:    from inputs to the activations at the cut, the only thing of it that travels: a tensor, or a flat dict of
               tensors, whose dimension 0 is the example.
    server:    from the activations to the model's output.
    auxiliary: likewise, but small: it gives a device gradients without asking the server.  Its parameters are called
               `auxiliary.…` and are no part of the whole model.
    tail:      the model's last layers, where these stay on the device too and with them the labels (U-shape): from what
               the server returns, which then is a second cut, to the model's output.  Called `tail.…`.
    loss, metrics: as for `Supervised`.

    Each part is a `Supervised` task of its own: `client_part`; and `server_part`, `auxiliary_part` and `tail_part`,
    whose batches are (activations, labels).  `Split.of` cuts a model of one piece.
    """

    def __init__(
        self,
        client: nn.Module,
        server: nn.Module,
        auxiliary: nn.Module | None = None,
        loss: Loss = cross_entropy,
        metrics: Mapping[str, Loss] | None = None,
        tokens_per_example: int | None = None,
        *,
        tail: nn.Module | None = None,
    ):
        parts = {"client": client, "server": server} | ({} if tail is None else {"tail": tail})
        super().__init__(Chain(**parts), loss, metrics, tokens_per_example=tokens_per_example)
        self._divide({name: Chain(**{name: part}) for name, part in parts.items()}, auxiliary)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        at: Any,
        *,
        auxiliary: nn.Module | int | Mapping[str, Any] | None = None,
        loss: Loss = cross_entropy,
        metrics: Mapping[str, Loss] | None = None,
        tokens_per_example: int | None = None,
        example: Any = None,
        tied: Literal["untie", "frozen", "sync"] = "untie",
    ) -> Split:
        """A model cut by `lilliput.split`; parameters are called as in the model.

        at, example, tied: as for `lilliput.split`; a pair of places for a U-shape.
        auxiliary:         a module that takes what the server's part takes, or the depth of a head derived from the
                           server's part, or all options of `lilliput.auxiliary`.

        tied="untie" and "frozen" change the whole model alike, which is copied for it.
        Raises ValueError for an impossible cut.
        """
        parts: tuple[Any, ...] = split(model, at, example=example, tied=tied)
        asked: Any = {"depth": auxiliary} if isinstance(auxiliary, int) else auxiliary
        head = derived_head(parts[1], **asked) if isinstance(asked, Mapping) else asked
        if isinstance(auxiliary, nn.Module) and len(parts) == 2:
            check_auxiliary(parts[1], auxiliary)
        if tied == "sync" and len(parts) == 3 and any(part.tied for part in parts[1:]):
            raise ValueError(
                "tied='sync' keeps a device's tensor equal to the server's, and the device's tail is a third that has "
                "it; use tied='untie' or 'frozen' with a tail"
            )
        task = cls.__new__(cls)
        same: dict[str, str] = parts[1].tied if tied == "sync" else {}
        whole = _agreeing(model, parts, same)
        Supervised.__init__(task, whole, loss, metrics, tokens_per_example=tokens_per_example)
        task._divide(dict(zip(("client", "server", "tail"), parts, strict=False)), head)
        trained = {name for name, p in whole.named_parameters() if p.requires_grad}
        task.tied = {name: other for name, other in same.items() if other in trained}
        return task

    def _divide(self, parts: Mapping[str, nn.Module], auxiliary: nn.Module | None) -> None:
        tasks = {name: Supervised(part, self.criterion, {}) for name, part in parts.items()}
        self.client_part, self.server_part = tasks["client"], tasks["server"]
        self.tail_part = tasks.get("tail")
        self.auxiliary_part = None if auxiliary is None else Supervised(Chain(auxiliary=auxiliary), self.criterion, {})
        self.tied: dict[str, str] = {}  # parameters of the server's part that are a device's too, by its name of them
        self.differentiable: frozenset[str] | None = None  # what of the activations needs gradients, once known
        # What is under way between the calls of a round, by client: its epoch, and its parts in training.
        self.streams: dict[int, Any] = {}
        self.halves: dict[int, Any] = {}

    @property
    def on_device(self) -> dict[str, Supervised]:
        """The parts that a device holds, by name."""
        return {"client": self.client_part} | ({} if self.tail_part is None else {"tail": self.tail_part})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "streams": {}, "halves": {}}


def _agreeing(model: nn.Module, parts: Sequence[nn.Module], same: Mapping[str, str]) -> nn.Module:
    """The whole model with as many tensors, and as many of them trained, as its parts have."""
    trained = {name: p for part in parts for name, p in part.named_parameters() if p.requires_grad}
    named = dict(model.named_parameters())
    apart = trained.keys() - named.keys() - same.keys()
    still = [name for name, p in named.items() if p.requires_grad and name not in trained]
    if apart or still:
        model = copy.deepcopy(model)
    for name in apart:
        owner, _, local = name.rpartition(".")
        setattr(model.get_submodule(owner), local, nn.Parameter(trained[name].detach().clone()))
    for name in still:
        model.get_parameter(name).requires_grad_(False)
    return model


def portion(part: Supervised, state: Body) -> Body:
    """A part's share of a state of the whole model: `params`, and `buffers` if it has any."""
    names = part.model.state_dict().keys()
    trees = {kind: {n: x for n, x in state.get(kind, {}).items() if n in names} for kind in ("params", "buffers")}
    return {kind: tree for kind, tree in trees.items() if tree or kind == "params"}
