"""FedSub in a training loop of one's own, one process per client under torch.distributed.

>>> subspace = replace_with_subspace(model, ["q_proj", "v_proj"], rank=64)
>>> optimizer, schedule = subspace_optimizer(model, lr=1e-3)
>>> for step, batch in enumerate(batches, 1):
...     loss(model, batch).backward()
...     optimizer.step(); schedule.step(); optimizer.zero_grad()
...     if step % 10 == 0:
...         outer_update(model, refresh=step % 100 == 0, optimizer=optimizer)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.optim.basis import Basis, leading, seeded_basis, sketch
from lilliput.optim.factory import decouples, reads_weights
from lilliput.subspace.dual import learnt, move_, rotated
from lilliput.subspace.layer import SubspaceLayer
from lilliput.subspace.shown import layers_of, shown


def subspace_layers(model: nn.Module) -> dict[str, SubspaceLayer]:
    """The layers of a model that are in subspaces, by name.  Raises ValueError if there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SubspaceLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer in a subspace; call replace_with_subspace first")
    return layers


def subspace_optimizer(
    model: nn.Module, lr: float, optimizer: Callable[..., Any] | None = None, *, warmup: int = 0,
    steps: int | None = None, **options: Any,
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:  # fmt: skip
    """An optimizer of all that is trained, whose steps see each b's gradient plus its dual, and its schedule.

    optimizer: a class of (parameters, lr=..., **options): torch's, SGD by default, or one of `lilliput.optim`.
    warmup:    steps over which the rate rises to lr; steps: after how many it has fallen to 0 along a cosine, if given.
    Weight decay is that of x + b P.  Steps raise ValueError for a closure, and for gradients that are still scaled.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}; it must be positive")
    layers = subspace_layers(model)
    made = (optimizer or torch.optim.SGD)([p for p in model.parameters() if p.requires_grad], lr=lr, **options)
    _correct(made, [layer for layer in layers.values() if layer.dual is not None])
    _show(made, list(layers.values()))

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        done = (step - warmup) / max(1, steps - warmup) if steps is not None else 0.0
        return rising * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))

    return made, torch.optim.lr_scheduler.LambdaLR(made, factor)


def _correct(optimizer: torch.optim.Optimizer, layers: Sequence[SubspaceLayer]) -> None:
    """Let its steps see each b's gradient plus the dual, as SCAFFOLD's do, and the layers keep the sum of both."""
    given: dict[SubspaceLayer, Tensor] = {}

    def before(made: Any, args: Any, kwargs: Any) -> None:
        if any(x is not None for x in (*args[1:], kwargs.get("closure"))):
            raise ValueError("a closure would make gradients without the duals; call backward(), then step()")
        if getattr(made, "grad_scale", None) is not None:
            raise ValueError("gradients are still scaled; call scaler.unscale_(optimizer) before its step")
        for layer in layers:
            if layer.b.grad is not None:
                given[layer] = layer.b.grad
                layer.b.grad = layer.corrected(layer.b.grad)

    def after(*_: Any) -> None:
        for layer, grad in given.items():
            layer.b.grad = grad
        given.clear()

    for layer in layers:
        layer.watch()
    if layers:
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def _show(optimizer: torch.optim.Optimizer, layers: Sequence[SubspaceLayer]) -> None:
    """Let its steps see the weights that layers stand for, if they depend on them."""
    if reads_weights(optimizer):
        stack, decoupled = ExitStack(), decouples(optimizer)
        optimizer.register_step_pre_hook(
            lambda *_: stack.enter_context(shown([x for x in layers if x.b.grad is not None], decoupled))
        )
        optimizer.register_step_post_hook(lambda *_: stack.close())


@torch.no_grad()
def outer_update(
    model: nn.Module, refresh: bool = False, gradients: Mapping[str, Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None, group: Any = None,
) -> None:  # fmt: skip
    """End a round: average b and all ordinary parameters over the processes, fold b in, move the duals.

        dual += u - mean u,   x += (mean b) P,   b = 0,   with u minus the mean gradient that a process's steps saw

    refresh:   change P, and take the duals to the new one.
    gradients: by layer, this process's dense gradient of the weight [like the weight], which `svd` finds its P from.
    optimizer: its state of each b is dropped when P changes, as it was of another basis.
    Without torch.distributed there is one client, whose duals stay zero.  Raises ValueError, and changes nothing, for
    svd without gradients, for what is not finite in any process, and where processes have other bases, or another x,
    than each other.
    """
    layers = subspace_layers(model)
    _check_agreed(layers, group)
    _check_finite(model, group)
    bases = {name: _next(name, layer, gradients, group) for name, layer in layers.items()} if refresh else {}
    _move_duals(list(layers.values()), group)
    _average([p for p in model.parameters() if p.requires_grad], group)
    _average([b for b in _statistics(model)], group)
    for name, layer in layers.items():
        layer.fold()
        if refresh:
            old = layer.basis
            layer.epoch.add_(1)
            layer.use(bases[name])
            if layer.dual is not None and not layer.full:
                layer.dual.copy_(rotated(layer.dual, old, layer.basis))
            if optimizer is not None and layer.origin[1] != "idx":  # the identity stays what it is
                optimizer.state.pop(layer.b, None)


def _move_duals(layers: Sequence[SubspaceLayer], group: Any) -> None:
    watched: list[Any] = [x for x in layers if x.seen is not None]
    us = [learnt(x.seen / x.taken if x.taken else None, x.own_dual).to(x.seen) for x in watched]
    means, taken = [u.clone() for u in us], [x.taken.to(x.seen) for x in watched]
    _average([*means, *taken], group)
    for layer, u, mean, steps in zip(watched, us, means, taken, strict=True):
        if steps:  # where nobody took one, nobody learnt anything
            move_(layer.dual, u, mean, layer.basis if layer.full else None)
        layer.seen.zero_()
        layer.taken.zero_()


def _next(name: str, layer: SubspaceLayer, gradients: Mapping[str, Tensor] | None, group: Any) -> Basis:
    label, projection = layer.origin
    rank, seed, epoch = layer.b.shape[-1], int(layer.seed), int(layer.epoch) + 1
    if projection is None:
        raise ValueError(f"{name} has a basis of your own; give it the next one with layer.use(basis)")
    if projection != "svd":
        return seeded_basis(projection, rank, layer.form.width, seed, label, epoch, dtype=layer.weight.dtype)
    if not gradients or name not in gradients:
        raise ValueError(
            f"projection=svd needs the dense gradient of {name} to change P; give it as gradients[{name!r}], or use cd"
        )
    g = layer.form.matrix(gradients[name]).reshape(-1, layer.form.width).float()
    mean = sketch(g, rank, "sketch", seed, label, epoch)
    _average([mean], group)
    if not mean.isfinite().all():
        raise ValueError(f"the gradient of {name} is not finite; give that of another batch")
    return leading(mean, rank)


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    """BatchNorm's running statistics."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            yield from (module.running_mean, module.running_var)  # type: ignore[misc]


def _check_agreed(layers: Mapping[str, SubspaceLayer], group: Any) -> None:
    """Raise ValueError, in every process, where they would fold into another x, or by another P, than each other."""
    if not _distributed():
        return
    here = torch.stack([torch.stack([x.seed, x.epoch, _checksum(x.weight)]) for x in layers.values()])
    bounds = torch.stack([here, -here])
    torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX, group=group)
    for name, values, high, low in zip(layers, here.tolist(), bounds[0].tolist(), (-bounds[1]).tolist(), strict=True):
        if values[:2] != high[:2] or values[:2] != low[:2]:
            raise ValueError(
                f"the basis of {name} is of seed {values[0]} and epoch {values[1]} here, of another elsewhere; "
                "give all one seed, and refresh in all of them or in none"
            )
        if high != low:
            raise ValueError(f"the frozen weight of {name} differs between processes; start all of them from one model")


def _check_finite(model: nn.Module, group: Any) -> None:
    """Raise ValueError, in every process, where a number to be averaged is not finite in one of them."""
    named: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    named |= {f"running statistic {i}": x for i, x in enumerate(_statistics(model))}
    named |= {f"the gradient of {n}": x.seen for n, x in layers_of(model).items() if x.seen is not None}
    wrong = torch.stack([~x.isfinite().all() for x in named.values()]).long()
    if _distributed():
        torch.distributed.all_reduce(wrong, torch.distributed.ReduceOp.MAX, group=group)
    if wrong.any():
        name = list(named)[int(wrong.argmax())]
        raise ValueError(f"{name} is not finite; go on from a state before, with a smaller learning rate")


def _checksum(x: Tensor) -> Tensor:
    """A number that tells other bits."""
    return x.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]).sum(dtype=torch.int64)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _average(tensors: list[Tensor], group: Any) -> None:
    """The mean over processes, in place, by one exchange for each type; gloo knows sums only."""
    if not tensors or not _distributed():
        return
    world = torch.distributed.get_world_size(group)
    for dtype in {x.dtype for x in tensors}:
        alike = [x for x in tensors if x.dtype == dtype]
        flat = torch.cat([x.detach().reshape(-1) for x in alike])
        torch.distributed.all_reduce(flat, group=group)
        for x, mean in zip(alike, (flat / world).split([x.numel() for x in alike]), strict=True):
            x.copy_(mean.view_as(x))
