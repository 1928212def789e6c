"""Low-rank adapters (LoRA, Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685) through the library `peft`.

An adapted weight is W + (alpha / rank) B A with W frozen.  Only adapters are trained, and so only they travel.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from lilliput.core.layers import is_linear
from lilliput.core.registry import nearest
from lilliput.core.sources import line, needs

M = TypeVar("M", bound=nn.Module)

# Queries and values, as in the paper, by family; GPT-2 has them and the keys in one matrix.
_TARGETS = {
    "gpt2": ("c_attn",), "llama": ("q_proj", "v_proj"), "distilbert": ("q_lin", "v_lin"), "t5": ("q", "v"),
}  # fmt: skip
_USUAL = (*_TARGETS.values(), ("query", "value"))  # BERT and its kin
_HEADS = (
    "classifier",
    "pre_classifier",
    "score",
)  # made for the data: an adapter beside a random head would learn little


def lora(model: M, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, targets: Sequence[str] | None = None) -> M:
    """Low-rank adapters beside a model's frozen weights: the same model, of whose parameters only these are trained.

    rank: of each adapter
    alpha: adapters are scaled by alpha / rank
    dropout: of what goes into the adapters
    targets: last names of the linear layers to adapt; queries and values by default

    A classification head is trained too.  A's weights come from torch's global generator, B starts as zero: until it is
    trained the model gives what it gave.  Raises ValueError for targets that the model does not have.
    """
    peft = needs("peft", "Hugging Face peft", "hf")
    if rank < 1:
        raise ValueError(f"lora.rank is {rank}; it must be at least 1")
    known = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m)})
    chosen = list(targets) if targets is not None else _usual(model, known)
    for target in chosen:
        if target not in known:
            raise ValueError(
                f"{type(model).__name__} has no linear layer {target!r} to adapt; {nearest(target, known)}"
            )
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=chosen)
    try:
        with warnings.catch_warnings():  # peft finds out by itself which way a matrix lies, and says so
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} cannot be adapted: {line(error)}") from error
    for name, module in model.named_modules():
        if name in _HEADS:
            module.requires_grad_(True)
    return model


def merged(model: M) -> M:
    """A copy of the model with its adapters added into the weights: as fast as the model without them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model


def _usual(model: nn.Module, known: Sequence[str]) -> list[str]:
    found = next((list(names) for names in _USUAL if {*names} <= {*known}), None)
    if found is None:
        names = ", ".join(known) or "none"
        raise ValueError(f"{type(model).__name__} has no usual layers to adapt; set lora.targets (there are {names})")
    return found
