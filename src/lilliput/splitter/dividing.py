"""The two parts for one cut, and what has to travel between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lilliput.core import random
from lilliput.splitter.blank import Blank, Outline, listed
from lilliput.splitter.parts import Client, Server, Shape, half, wire_name
from lilliput.splitter.probes import EXAMPLES, Inputs, call
from lilliput.splitter.trace import owners
from lilliput.splitter.values import leaves, mapped
from lilliput.splitter.verify import untouched


def divide(model: nn.Module, at: str, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]) -> tuple[Client, Server]:
    """Both parts for a cut before the module `at`, with what travels between them decided on the two batches."""
    with untouched(model):
        own = owners(model.train(), at, lambda: call(model, batches[0]))
    client = Client(half(model, own.client, own.lent), at)
    server = Server(half(model, own.server), at)
    for name in own.outlined:
        module = server.get_submodule(name)
        module.__dict__["forward"] = Outline(module, name)
    with untouched(client), untouched(server):
        client.train(), server.train()
        agree(client, server, batches, shared)
    return client, server


def agree(client: Client, server: Server, batches: tuple[Inputs, Inputs], shared: tuple[str, ...]) -> None:
    """Settle what travels: of what the cut module is called with, whatever the server cannot work out by itself."""
    named = [{n: x for n, x in leaves(b).items() if isinstance(x, Tensor)} for b in batches]
    candidates = tuple(n for n in named[0] if n.rpartition(".")[2] in shared)
    seen = [_Seen.of(client, server, b, candidates) for b in batches]
    for name in candidates:  # one by one: is it needed?
        fewer = tuple(n for n in candidates if n != name)
        again = [_Seen.of(client, server, b, fewer) for b in batches]
        if [s[1:] for s in again] == [s[1:] for s in seen]:
            candidates, seen = fewer, again
    missing = seen[0].missing | seen[1].missing
    if missing:
        raise ValueError(f"what the server computes depends on {listed(missing)}")
    sends = tuple(n for n in seen[0].taken if n in seen[0].travels | seen[1].travels)
    spread = frozenset(n for n in sends if _one_for_all(n, seen))
    for part in (client, server):
        part.sends, part.shares, part.spread = sends, candidates, spread
    client.inputs = frozenset(named[0])
    _refuse_raw(named, seen, sends)
    if not any(True for _ in client.parameters()):
        raise ValueError("the inputs themselves would travel; nothing of the model would be before it")
    payloads = [s.payload(sends, spread, candidates, x) for s, x in zip(seen, named, strict=True)]
    server.inputs = _shapes(batches, payloads)
    client.payload = server.payload = {n: Shape(tuple(x.shape), x.dtype) for n, x in payloads[0].items()}


class _Seen(NamedTuple):
    """One batch at the cut: what the cut module is called with, what of it must travel, and what the server misses for
    its output."""

    taken: dict[str, Tensor]
    travels: frozenset[str]
    missing: frozenset[str]

    @classmethod
    def of(cls, client: Client, server: Server, batch: Inputs, shares: tuple[str, ...]) -> _Seen:
        given = leaves(batch)
        with torch.no_grad(), random.seeded("probe"):
            taken = leaves(client.reach(**batch))
            flat = {n: x for n, x in taken.items() if isinstance(x, Tensor)}
            server.sends, server.shares, server.spread = tuple(flat), shares, frozenset()
            server.inputs = mapped(batch, lambda n, x: Shape(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x)
            payload = {wire_name(n, shares): x for n, x in flat.items()} | {n: given[n] for n in shares}
            own: dict[str, Any] = {}
            try:
                out = server.replay(payload, own)
            except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
                raise ValueError(f"the server cannot replay what comes before it by shapes alone: {error}") from error
        for n, x in taken.items():
            if isinstance(x, bool | int | float | str) and own.get(n) != x:
                raise ValueError(f"{n} is {x} on the client and {own.get(n)} on the server, and is no tensor to send")
        travels = frozenset(n for n, x in flat.items() if not _equal(x, own.get(n)))
        blanks = [x for x in leaves(out).values() if isinstance(x, Blank)]
        return cls(flat, travels, frozenset().union(*(x.origin for x in blanks)))

    def payload(
        self, sends: Sequence[str], spread: frozenset[str], shares: Sequence[str], given: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What of it travels."""
        sent = {wire_name(n, shares): self.taken[n] for n in sends}
        rows = next(iter(given.values())).shape[0]
        own = {n: x.expand(rows, *x.shape[1:]) if n in spread else x for n, x in sent.items()}
        return own | {n: given[n] for n in shares}


def _equal(x: Tensor, own: Any) -> bool:
    if isinstance(own, Blank) or not isinstance(own, Tensor) or own.shape != x.shape or own.dtype != x.dtype:
        return False
    return x.device.type == "meta" or torch.equal(x, own)


def _one_for_all(name: str, seen: Sequence[_Seen]) -> bool:
    sizes = tuple(s.taken[name].shape[:1] for s in seen)
    if sizes == tuple((n,) for n in EXAMPLES):
        return False
    if sizes == ((1,),) * len(EXAMPLES):
        return True
    shape = tuple(seen[0].taken[name].shape)
    raise ValueError(f"{name} of shape {shape} would have to travel, and its dimension 0 is not the example")


def _refuse_raw(inputs: Sequence[dict[str, Tensor]], seen: Sequence[_Seen], sends: Sequence[str]) -> None:
    for name in sends:
        for source, x in inputs[0].items():
            sent = seen[0].taken[name]
            if sent is x or (sent.shape == x.shape and sent.untyped_storage()._cdata == x.untyped_storage()._cdata):
                raise ValueError(f"the input {source!r} itself would travel; nothing of the model would be before it")


def _shapes(batches: Sequence[Inputs], payloads: Sequence[dict[str, Tensor]]) -> Inputs:
    """The inputs, each tensor by its shape, whose sizes are those of the payload where they are not always the same."""
    second = leaves(batches[1])
    sizes = [{(n, i): size for n, x in p.items() for i, size in enumerate(x.shape)} for p in payloads]

    def size(*pair: int) -> int | tuple[str, int]:
        if pair[0] == pair[1]:
            return pair[0]
        return next((at for at in sizes[0] if (sizes[0][at], sizes[1][at]) == pair), pair[0])

    def shape(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return Shape(tuple(size(a, b) for a, b in zip(x.shape, second[name].shape, strict=True)), x.dtype)

    return mapped(batches[0], shape)
