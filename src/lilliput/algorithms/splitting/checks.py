"""Checks a split task before training, by running one example through its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lilliput.core import random, tree
from lilliput.core.labels import cloned, columns, count, labels
from lilliput.core.tree import MALFORMED
from lilliput.splitter import Split
from lilliput.tasks import Supervised
from lilliput.tasks.moving import Movable


class Sight(NamedTuple):
    """One example's activations at the cut, and its logits."""

    cut: Any
    logits: Tensor


def look(task: Split, data: Mapping[int, Any]) -> Sight:
    """Run one example of the first client through all parts; records in the task which activations have gradients.

    Raises ValueError if a part does not fit its input, or if labels exceed the model's outputs.
    """
    batch = next(data[min(data)].epoch(None))
    one = {n: x[:1] for n, x in batch.items()} if isinstance(batch, dict) else tuple(x[:1] for x in batch)
    cut = through(task.client_part, one, f"the device's part does not take a batch of {shapes(batch)}")
    check_payload(cut, "the device's part")
    named = {"": cut} if isinstance(cut, Tensor) else cut
    task.differentiable = frozenset(name for name, x in named.items() if x.requires_grad)
    wrong = f"what leaves the device's part, {shapes((cut,))}, does not fit the server's part"
    out = through(task.server_part, (cut, labels(one)), wrong)
    if task.tail_part is not None:
        check_payload(out, "the server's part")
        wrong = f"what leaves the server's part, {shapes((out,))}, does not fit the tail"
        out = through(task.tail_part, (out, labels(one)), wrong)
    logits = out["logits"] if isinstance(out, dict) else out
    check_labels(logits, data)
    return Sight(cut, logits)


def through(part: Supervised, batch: Any, wrong: str) -> Any:
    """A part's output on a copy of a batch; records in the part whether it changes its input.

    Raises ValueError, with a message that begins with `wrong`, if the part fails.
    """
    with Movable(part.model).unmoved(), random.seeded("look"), torch.enable_grad():
        try:
            out, part.inplace = _forward(part, batch, training=False)
        except MALFORMED as error:
            raise ValueError(f"{wrong}: {error}; make the widths of both sides of the cut agree") from error
        with suppress(Exception):  # BatchNorm cannot train on a single example
            part.inplace |= _forward(part, batch, training=True)[1]
    return out


def _forward(part: Supervised, batch: Any, training: bool) -> tuple[Any, bool]:
    """A part's output on a copy of a batch, and whether it changed the copy."""
    own = cloned(batch)
    given = list(columns(own))
    before = [x._version for x in given]
    with mode(part.model, training):
        return part.forward(part.model, own), [x._version for x in given] != before


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode for a block; restores all modes afterwards."""
    whole, modes = model.training, [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        model.train(whole)
        for module, mode in modes:
            module.training = mode


def check_payload(payload: Any, of: str) -> None:
    """Raise ValueError if a payload cannot cross a cut."""
    xs = [payload] if isinstance(payload, Tensor) else list(payload.values()) if isinstance(payload, Mapping) else []
    if not xs or not all(isinstance(x, Tensor) and x.shape[:1] == (1,) for x in xs):
        raise ValueError(
            f"{of} returns {type(payload).__name__} {shapes((payload,))} for one example; what crosses a cut is a "
            "tensor, or a flat dict of tensors, whose dimension 0 is the example"
        )


def check_labels(logits: Tensor, data: Mapping[int, Any]) -> None:
    """Raise ValueError if labels of several clients exceed the outputs; a single such client fails in training."""
    largest = {}
    for c in sorted(data):
        y = labels(next(data[c].epoch(None)))
        if y.is_floating_point() or y.dim() != logits.dim() - 1:
            return
        largest[c] = int(y.max())
    beyond = [c for c, label in largest.items() if label >= logits.shape[-1]]
    if len(beyond) > 1 or len(beyond) == len(largest):
        c = beyond[0]
        raise ValueError(
            f"client {c} has the label {largest[c]}, and the model has {logits.shape[-1]} outputs, 0 to "
            f"{logits.shape[-1] - 1}; give its last layer as many outputs as there are classes"
        )


def check_head(task: Any, sight: Sight, data: Mapping[int, Any]) -> None:
    """Raise ValueError if the auxiliary head does not fit the cut, or its outputs differ from the server's."""
    y = labels(next(data[min(data)].epoch(None)))[:1]
    wrong = f"what leaves the device's part, {shapes((sight.cut,))}, does not fit the auxiliary head"
    out = through(task.auxiliary_part, (sight.cut, y), wrong)
    logits = out["logits"] if isinstance(out, dict) else out
    if logits.shape != sight.logits.shape:
        raise ValueError(
            f"the auxiliary head gives {tuple(logits.shape[1:])} for an example, and the server's part "
            f"{tuple(sight.logits.shape[1:])}; give the head's last layer {sight.logits.shape[-1]} outputs"
        )


def check_memory(size: int, data: Mapping[int, Any]) -> None:
    """Raise ValueError if a client's batch does not fit into the server's memory of the client."""
    for c in sorted(data):
        fits(size, count(next(data[c].epoch(None))), c)


def fits(size: int, batch: int, client: int) -> None:
    """Raise ValueError if a batch is larger than the memory."""
    if batch > size:
        raise ValueError(
            f"memory_size is {size}, less than a batch of {batch} of client {client}; choose memory_size >= batch_size"
        )


def shapes(batch: Any) -> str:
    """The shapes of a batch or payload as text for errors."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    return ", ".join(str(tuple(x.shape)) for value in values for x in tree.tensors(value)) or "of nothing"
