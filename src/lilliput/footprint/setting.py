"""Everything that a footprint depends on: the model, the optimizer, and how they train."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lilliput import lean, optim
from lilliput.core.registry import is_path, normal
from lilliput.fake import copied
from lilliput.footprint.steps import Steps, supervised_loss
from lilliput.optim.factory import build, settled
from lilliput.subspace import replace_with_subspace
from lilliput.training.settings import Training, check_step

LENGTH = 256  # tokens of a sequence, as published for low-rank pre-training


@dataclass(frozen=True)
class Setting:
    """One way to train one model, in the words of `lilliput pretrain`."""

    model: Any = "llama_60m"  # a name, a folder or a config.json; in Python also a module on any device, or on "meta"
    model_options: dict[str, Any] = field(default_factory=dict)  # of the model: model.hidden=256, model.layers=4
    optimizer: Any = "adamw"  # a name; in Python also a function of the module that gives a torch.optim.Optimizer
    optimizer_options: dict[str, Any] = field(default_factory=dict)  # optimizer.rank=128, optimizer.states=8bit
    batch_size: int = 16  # examples of a step
    accumulate: int = 1  # passes that a batch is cut into
    max_length: int | None = None  # tokens of an example; 256, or as many as the model has positions
    shape: tuple[int, ...] = (3, 32, 32)  # of an example that is no text, where the model does not say it
    classes: int = 10  # how many labels there are, where the model does not say it
    dtype: Literal["float32", "bf16"] = "float32"  # of the weights
    precision: Literal["float32", "bf16"] = "float32"  # of the products: bf16 is autocast over float32 weights
    per_layer: bool = False  # update each parameter in the backward pass, so that one gradient lives at a time
    checkpointing: bool = False  # recompute each block's activations in the backward pass instead of keeping them
    lean: bool = True  # layers that save less for the backward pass, and the loss in chunks
    lora: int | None = None  # train adapters of this rank on every linear layer but the head, and nothing else
    subspace: int | None = None  # train all layers but the head in a subspace of this rank, with a dual, as FedSub does
    padded: bool = False  # texts of different lengths, so that attention needs a mask
    device: str = "cuda"  # cpu, or an accelerator: any with an attention kernel that keeps no scores

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "max_length", "classes", "lora", "subspace"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a whole number above 0")
        if self.lora is not None and self.subspace is not None:
            raise ValueError("lora and subspace are two ways to train the same layers; choose one")
        check_step(self.batch_size, self.accumulate, self.dtype, self.precision)
        if isinstance(self.optimizer, str):
            settled(self.optimizer, self.optimizer_options, 0.0)

    @property
    def autocast(self) -> bool:
        """Whether the forward pass runs under autocast."""
        return self.precision == "bf16"

    def module(self) -> nn.Module:
        """The model on the meta device, in its dtype, frozen and adapted as the setting says."""
        model = self._built() if isinstance(self.model, str) else copied(self.model)
        if self.lora is not None:
            from lilliput.models.adapters import lora

            with torch.device("meta"):
                model = lora(model, self.lora, targets=_linear(model))
        if self.subspace is not None:
            layers = replace_with_subspace(model, rank=self.subspace).layers
            for layer in layers.values() if self.optimizer != "sgd" else ():
                layer.watch()  # a dual beside an adaptive optimizer needs the mean of the gradients that it was given
        model = model.to(torch.bfloat16) if self.dtype == "bf16" else model
        return lean.patch(model) if self.lean else model

    def _built(self) -> nn.Module:
        from lilliput import models
        from lilliput.models.transformers import NAMES, empty

        name = str(self.model)
        ours = is_path(name) or normal(name) in map(normal, models.MODELS.keys() - NAMES.keys())
        if not ours or Path(name).exists():
            return empty(name, **self.model_options)
        with torch.device("meta"):
            return models.build(name, shape=self._shape(name), classes=self.classes, **self.model_options)

    def _shape(self, name: str) -> tuple[int, ...]:
        return (self.max_length or LENGTH,) if normal(name) in ("charlm", "charlstm") else self.shape

    def steps(self, model: nn.Module) -> Steps:
        """The training of this setting's module."""
        config = Training(
            accumulate=self.accumulate, precision=self.precision, per_layer=self.per_layer,
            checkpointing=self.checkpointing,
        )  # fmt: skip
        return Steps(model, config, supervised_loss, self.made(model))

    def made(self, model: nn.Module) -> torch.optim.Optimizer:
        if not isinstance(self.optimizer, str):
            return self.optimizer(model)
        params = [p for p in model.parameters() if p.requires_grad]
        return build(self.optimizer, params, 1e-3, settled(self.optimizer, self.optimizer_options, 0.0), model)

    def example(self, model: nn.Module) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """The batch of one step, on the meta device."""
        n = self.batch_size
        ids = partial(torch.empty, dtype=torch.int64, device="meta")
        if not any(isinstance(m, nn.Embedding) for m in model.modules()):
            dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
            return torch.empty(n, *self.image(model), dtype=dtype, device="meta"), ids(n)
        length = self.tokens(model)
        if not hasattr(model, "config"):
            return ids(n, length), ids(n, length)
        label = ids(n, length) if model.get_output_embeddings() is not None else ids(n)  # type: ignore[operator]
        mask = {"attention_mask": ids(n, length)} if self.padded else {}
        return {"input_ids": ids(n, length), **mask, "labels": label}

    def tokens(self, model: nn.Module) -> int:
        """Tokens of an example.  Raises ValueError if the model has fewer positions."""
        most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if self.max_length is not None and most is not None and self.max_length > most:
            raise ValueError(
                f"max_length={self.max_length} exceeds the {most} positions of the model; "
                f"set model.max_position_embeddings={self.max_length}, or max_length={most}"
            )
        return self.max_length or min(LENGTH, most or LENGTH)

    def image(self, model: nn.Module) -> tuple[int, ...]:
        """The shape of an example that is not text: the model's own if its config gives it."""
        config: Any = getattr(model, "config", None)
        return (config.num_channels, config.image_size, config.image_size) if config is not None else self.shape


def _linear(model: nn.Module) -> list[str]:
    """The last components of the names of a model's linear layers, except its head."""
    names = optim.param_groups(model, rank=1)[0]["names"]
    return sorted({name.split(".")[-2] for name in names})
