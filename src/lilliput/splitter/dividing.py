"""The two parts for one cut, and what has to travel between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lilliput.core import random
from lilliput.fake import Placeholder
from lilliput.fake.placeholder import listed
from lilliput.splitter.names import leaves, mapped, mapped_tensors, tensors
from lilliput.splitter.parts import Client, Server, ShapeForward, TensorSpec, holding, wire_name
from lilliput.splitter.probes import EXAMPLES, Inputs, call
from lilliput.splitter.trace import owners, untouched


def divide(model: nn.Module, at: str, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]) -> tuple[Client, Server]:
    """Both parts for a cut before the module `at`, with what travels between them decided on the two batches."""
    with untouched(model):
        names = owners(model.train(), at, lambda: call(model, batches[0]))
    client = Client(holding(model, names.client, names.lent), at)
    server = Server(holding(model, names.server), at)
    for name in names.finished:
        module = server.get_submodule(name)
        module.__dict__["forward"] = ShapeForward(module, name)
    with untouched(client), untouched(server):
        client.train(), server.train()
        agree(client, server, batches, shared)
    return client, server


def divide_or_none(
    model: nn.Module, at: str, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]
) -> tuple[Client, Server] | None:
    """The same; None for an impossible cut."""
    try:
        return divide(model, at, batches, shared)
    except ValueError:
        return None


def agree(client: Client, server: Server, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]) -> None:
    """Decide what travels: those of the cut module's arguments that the server cannot work out by itself."""
    inputs = [tensors(b) for b in batches]
    shares = tuple(n for n in inputs[0] if n.rpartition(".")[2] in shared)
    cuts = [_Cut.of(client, server, b, shares) for b in batches]
    for name in shares:  # one by one: is it needed?
        fewer = tuple(n for n in shares if n != name)
        without = [_Cut.of(client, server, b, fewer) for b in batches]
        if [c[1:] for c in without] == [c[1:] for c in cuts]:
            shares, cuts = fewer, without
    missing = cuts[0].missing | cuts[1].missing
    if missing:
        raise ValueError(f"what the server computes depends on {listed(missing)}")
    sends = tuple(n for n in cuts[0].arguments if n in cuts[0].travels | cuts[1].travels)
    spread = frozenset(n for n in sends if _one_row(n, cuts))
    for part in (client, server):
        part.sends, part.shares, part.spread = sends, shares, spread
    client.inputs = frozenset(inputs[0])
    _refuse_raw_inputs(inputs, cuts, sends)
    if not any(True for _ in client.parameters()):
        raise ValueError("the inputs themselves would travel; nothing of the model would be before it")
    payloads = [c.payload(sends, spread, shares, x) for c, x in zip(cuts, inputs, strict=True)]
    server.inputs = _specs(batches, payloads)
    client.payload = server.payload = {n: TensorSpec.of(x) for n, x in payloads[0].items()}


class _Cut(NamedTuple):
    """One batch at the cut.

    arguments: the tensors that the cut module is called with.
    travels:   names of those that the server does not compute by itself.
    missing:   what else the server's output depends on.
    """

    arguments: dict[str, Tensor]
    travels: frozenset[str]
    missing: frozenset[str]

    @classmethod
    def of(cls, client: Client, server: Server, batch: Inputs, shares: tuple[str, ...]) -> _Cut:
        inputs = leaves(batch)
        with torch.no_grad(), random.seeded("probe"):
            arguments = leaves(client.reach(**batch))
            sent = tensors(arguments)
            server.sends, server.shares, server.spread = tuple(sent), shares, frozenset()
            server.inputs = mapped_tensors(batch, TensorSpec.of)
            payload = {wire_name(n, shares): x for n, x in sent.items()} | {n: inputs[n] for n in shares}
            replayed: dict[str, Any] = {}
            try:
                out = server.replay(payload, replayed)
            except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
                raise ValueError(f"the server cannot replay what comes before it by shapes alone: {error}") from error
        for n, x in arguments.items():
            if isinstance(x, bool | int | float | str) and replayed.get(n) != x:
                raise ValueError(
                    f"{n} is {x} on the client and {replayed.get(n)} on the server, and is no tensor to send"
                )
        travels = frozenset(n for n, x in sent.items() if not _equal(x, replayed.get(n)))
        unknown = [x.sources for x in leaves(out).values() if isinstance(x, Placeholder)]
        return cls(sent, travels, frozenset().union(*unknown))

    def payload(
        self, sends: Sequence[str], spread: frozenset[str], shares: Sequence[str], inputs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What of it travels."""
        rows = next(iter(inputs.values())).shape[0]
        sent = {n: self.arguments[n] for n in sends}
        sent = {n: x.expand(rows, *x.shape[1:]) if n in spread else x for n, x in sent.items()}
        return {wire_name(n, shares): x for n, x in sent.items()} | {n: inputs[n] for n in shares}


def _equal(x: Tensor, other: Any) -> bool:
    if isinstance(other, Placeholder) or not isinstance(other, Tensor):
        return False
    same = other.shape == x.shape and other.dtype == x.dtype
    return same and (x.device.type == "meta" or torch.equal(x, other))


def _one_row(name: str, cuts: Sequence[_Cut]) -> bool:
    """Whether a tensor has one row for all examples; raises ValueError if its rows are neither one nor the examples."""
    sizes = tuple(c.arguments[name].shape[:1] for c in cuts)
    if sizes == tuple((n,) for n in EXAMPLES):
        return False
    if sizes == ((1,),) * len(EXAMPLES):
        return True
    shape = tuple(cuts[0].arguments[name].shape)
    raise ValueError(f"{name} of shape {shape} would have to travel, and its dimension 0 is not the example")


def _refuse_raw_inputs(inputs: Sequence[dict[str, Tensor]], cuts: Sequence[_Cut], sends: Sequence[str]) -> None:
    for name in sends:
        for source, x in inputs[0].items():
            sent = cuts[0].arguments[name]
            if sent is x or (sent.shape == x.shape and sent.untyped_storage()._cdata == x.untyped_storage()._cdata):
                raise ValueError(f"the input {source!r} itself would travel; nothing of the model would be before it")


def _specs(batches: Sequence[Inputs], payloads: Sequence[dict[str, Tensor]]) -> Inputs:
    """The inputs with a spec for each tensor, whose sizes refer to the payload where the two batches differ."""
    second = leaves(batches[1])
    sizes = [{(n, i): size for n, x in p.items() for i, size in enumerate(x.shape)} for p in payloads]

    def size(*pair: int) -> int | tuple[str, int]:
        if pair[0] == pair[1]:
            return pair[0]
        return next((at for at in sizes[0] if (sizes[0][at], sizes[1][at]) == pair), pair[0])

    def spec(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return TensorSpec(tuple(size(a, b) for a, b in zip(x.shape, second[name].shape, strict=True)), x.dtype)

    return mapped(batches[0], spec)
