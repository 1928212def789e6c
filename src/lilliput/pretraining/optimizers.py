"""The optimizer of a run by its name: ours, with the model's linear layers projected, or any of torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lilliput import optim
from lilliput.optim import factory
from lilliput.pretraining.config import Pretrain
from lilliput.pretraining.parallel import Sums, World
from lilliput.training.settings import Training
from lilliput.training.step import Trainer, trained
from lilliput.training.updates import Wrapped, from_body, to_body

NAMES = tuple(factory.OPTIMIZERS)


def build(model: nn.Module, c: Pretrain) -> torch.optim.Optimizer:
    """The optimizer of the settings over a model's trainable parameters.

    Raises ValueError for an unknown name or option, for a rank that nothing has, and for what only ours can do.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    made = factory.build(
        c.optimizer, params, c.lr, factory.settled(c.optimizer, c.optimizer_options, c.weight_decay), model
    )
    if not isinstance(made, optim.SubspaceOptimizer) and (c.per_layer or c.parallel == "fsdp"):
        what = "per_layer=true" if c.per_layer else "parallel=fsdp"
        raise ValueError(
            f"{what} works with our own optimizers, not {c.optimizer}; choose one of {', '.join(factory.OURS)}"
        )
    return made


def trainer(loss: nn.Module, optimizer: torch.optim.Optimizer, c: Pretrain, world: World) -> Trainer:
    """What takes the steps of a run, alone or as one of several processes."""
    beside = world if c.parallel == "ddp" and world.size > 1 else None  # FSDP2 sums gradients itself
    params = trained(loss)
    hooks: Any = Sums(params, world) if beside and not c.per_layer else None
    if c.per_layer:
        hooks = optim.per_layer(optimizer, c.accumulate, c.clip, processes=beside)  # type: ignore[arg-type]
    config = Training(accumulate=c.accumulate, clip=c.clip, precision=c.precision, per_layer=c.per_layer)
    return Trainer(loss, config, c.lr, update=Wrapped(optimizer, params), hooks=hooks)


def state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer knows, as a body on the CPU; under FSDP a collective call."""
    packed = optimizer.state_dict()
    held: dict[str, Any] = to_body(packed["state"])
    return {"state": held, "skipped": {str(i): g.get("skipped", 0) for i, g in enumerate(packed["param_groups"])}}


def load(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take back what `state` gave.  Settings such as lr stay those of the optimizer.

    Raises ValueError if it belongs to another optimizer or model.
    """
    packed = optimizer.state_dict()
    groups = packed["param_groups"]
    for i, group in enumerate(groups):
        if "skipped" in group:
            group["skipped"] = saved["skipped"].get(str(i), 0)
    known = {str(key) for group in groups for key in group["params"]}
    if saved["state"].keys() - known:
        raise ValueError("the optimizer's state is of a model with more parameters")
    restored = {int(key): from_body(value) for key, value in saved["state"].items()}
    optimizer.load_state_dict({"state": restored, "param_groups": groups})


def skipped(optimizer: torch.optim.Optimizer) -> int:
    """Updates left out because a gradient was not finite, over all parameters so far."""
    return sum(int(group.get("skipped", 0)) for group in optimizer.param_groups)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors."""
    return sum(x.nbytes for held in optimizer.state.values() for x in held.values() if isinstance(x, Tensor))
