"""Comparing both parts with the model: outputs, gradients and buffers, on two batches, in training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.fake import Placeholder
from lilliput.splitter.names import states, tensors
from lilliput.splitter.parts import Client, Server
from lilliput.splitter.probes import Inputs, call
from lilliput.splitter.trace import seeded, untouched

Results = dict[str, dict[str, Tensor]]  # outputs, gradients and buffers, each by name


def verify(model: nn.Module, client: Client, server: Server, batches: tuple[Inputs, Inputs]) -> None:
    """Raise ValueError unless the parts together do what the model does, bit for bit on a CPU.

    Elsewhere sums are taken in any order, and values agree to 1e-4 of the largest.  Dropout draws the same in both, as
    the server's replay draws nothing before the cut.  On the meta device only shapes are compared.
    """
    names: dict[int, list[str]] = {}
    for name, x, _, _ in states(model):
        names.setdefault(id(x), []).append(name)
    with untouched(model), untouched(client), untouched(server):
        for training in (True, False):
            for module in (model, client, server):
                module.train(training)
            for batch in batches:
                whole = _run(lambda b: call(model, b), batch, model)
                parts = _run(lambda b: server(call(client, b)), batch, client, server)
                parts["gradient"] = _summed(parts["gradient"], list(names.values()))
                for kind in whole:
                    _compare(kind, whole[kind], parts[kind])


def _run(forward: Callable[[Inputs], Any], batch: Inputs, *modules: nn.Module) -> Results:
    with seeded("verify", *modules), torch.enable_grad():
        outputs = tensors(forward(batch))
        named = {n: x for m in modules for n, x in m.named_parameters() if x.requires_grad}
        roots = {n: x for n, x in outputs.items() if x.requires_grad and not isinstance(x, Placeholder)}
        pulls = [torch.randn_like(x) for x in roots.values()]
        grads = (
            torch.autograd.grad(list(roots.values()), list(named.values()), pulls, allow_unused=True) if roots else ()
        )
    buffers = {n: x.clone() for m in modules for n, x, _, kind in states(m) if kind == "_buffers"}
    gradient = {n: g for n, g in zip(named, grads, strict=False) if g is not None}
    return {"output": outputs, "gradient": gradient, "buffer": buffers}


def _summed(gradients: dict[str, Tensor], groups: list[list[str]]) -> dict[str, Tensor]:
    """The gradients of tensors that have several names, summed over these and given the first of them."""
    by_first = {group[0]: [gradients[n] for n in group if n in gradients] for group in groups}
    return {name: sum(grads[1:], grads[0]) for name, grads in by_first.items() if grads}


def _compare(kind: str, whole: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    for name in sorted(whole.keys() | parts.keys()):
        x, y = whole.get(name), parts.get(name)
        if x is None or y is None:
            raise ValueError(f"{kind} {name!r} is {'missing from' if y is None else 'only in'} the parts")
        if x.shape != y.shape or x.dtype != y.dtype or isinstance(y, Placeholder):
            raise ValueError(f"{kind} {name!r} is {y!r:.99} and not of shape {tuple(x.shape)}, {x.dtype}")
        if x.device.type == "meta" or torch.equal(x, y):
            continue
        error, size = (x - y).abs().max().item(), x.abs().max().item()
        if x.device.type == "cpu" or not error <= 1e-4 * size:
            raise ValueError(f"{kind} {name!r} differs from the whole model's by {error:.2g} of {size:.2g}")
