"""The model of a run and its loss, as one module, so that what wraps a forward pass wraps all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lilliput import lean
from lilliput.core import random
from lilliput.core.labels import IGNORED
from lilliput.core.registry import is_path, resolve
from lilliput.experiment import checkpoint
from lilliput.pretraining.config import Pretrain
from lilliput.tasks.carried import check_model

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


class LanguageLoss(nn.Module):
    """A causal model with its loss.  The model's parameters have the names that they have in it, after `model.`"""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The mean over all labels but -100 of their cross-entropy, in float32, and 0 of none; both (n, length)."""
        mean = self._mean(input_ids, labels)
        return torch.where((labels != IGNORED).any(), mean, 0.0)  # torch's mean of nothing is nan

    def _mean(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if lean.patched(self.model):
            return lean.loss(self.model, {"input_ids": input_ids, "labels": labels})
        out = self.model(input_ids)
        logits = out["logits"] if isinstance(out, Mapping) else out
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED)


def build(c: Pretrain) -> nn.Module:
    """The model of the settings, its weights by the seed, or those of `model` if that is a folder with weights.

    Raises ValueError for a model that there is not, for an option that it has not, and for what cannot be trained.
    """
    with random.seeded(c.seed, "model"):
        model = _made(c) if c.lora is None else adapted(_made(c), c.lora)
    if c.init is not None:
        from lilliput.models.weights import load_weights

        load_weights(model, *checkpoint.initial(Path(c.init)))
    check_model(model)
    dtype = DTYPES[c.dtype]
    # `model.to` would also make complex numbers real, and lose half of each.
    model._apply(lambda x: x.to(dtype) if x.is_floating_point() else x)
    return lean.patch(model) if c.lean else model


def _made(c: Pretrain) -> nn.Module:
    if not is_path(c.model):
        from lilliput.models.transformers import pretrained

        return pretrained(c.model, **c.model_options)
    made: Any = resolve("model", c.model, {})(**c.model_options)
    if not isinstance(made, nn.Module):
        raise ValueError(f"model {c.model!r} made something of type {type(made).__name__}; it must make an nn.Module")
    return made


def adapted(model: nn.Module, rank: int) -> nn.Module:
    """Adapters beside every linear layer but the head, whose weights are frozen; embeddings, norms, head are trained.

    The scale is 32 / rank, as in the comparisons that GaLore made.
    """
    from lilliput import optim
    from lilliput.models.adapters import lora

    names = optim.param_groups(model, rank=1)[0]["names"]
    lora(model, rank, alpha=32.0, targets=sorted({name.split(".")[-2] for name in names}))
    for name, p in model.named_parameters():
        p.requires_grad_(".base_layer." not in name)
    return model


def plain(model: nn.Module) -> nn.Module:
    """The model as it is used: adapters, if it has any, added into its weights."""
    if not any(".base_layer." in name for name, _ in model.named_parameters()):
        return model
    from lilliput.models.adapters import merged

    return merged(model)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers by name, tied ones once; of sharded weights whole ones, by a collective call."""
    kept = model.state_dict(keep_vars=True).keys()
    named = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in kept}}
    return {name: _whole(x.detach()) for name, x in named.items()}


def restore(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Copy back what `tensors` gave.  Raises ValueError for another model's."""
    kept = model.state_dict(keep_vars=True).keys()
    own = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in kept}}
    for name in own.keys() ^ saved.keys():
        raise ValueError(f"{name!r} is only in {'the checkpoint' if name in saved else 'the model'}: another model")
    for name, x in own.items():
        if x.shape != saved[name].shape:
            raise ValueError(f"{name!r} has shape {tuple(saved[name].shape)}, the model's {tuple(x.shape)}")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(_like(saved[name], x))


def _whole(x: Any) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _like(saved: Tensor, x: Any) -> Tensor:
    if not hasattr(x, "full_tensor"):
        return saved
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(saved.to(x.device, x.dtype), x.device_mesh, x.placements, src_data_rank=None)
