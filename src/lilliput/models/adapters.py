"""Low-rank adapters (LoRA, Hu et al., ICLR 2022, https://arxiv.org/abs/2106.09685) through the library `peft`.

An adapted weight is W + (alpha / rank) B A with W frozen.  Only the adapters are trained, and only they are sent.
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

# The projections of queries and values, as in the paper, by family; GPT-2 has them and the keys in one matrix.
_TARGETS = {
    "gpt2": ("c_attn",), "llama": ("q_proj", "v_proj"), "distilbert": ("q_lin", "v_lin"), "t5": ("q", "v"),
}  # fmt: skip
_USUAL = (*_TARGETS.values(), ("query", "value"))  # BERT and its kin
# These heads are new, so they are trained too: an adapter below a random head would learn little.
_HEADS = ("classifier", "pre_classifier", "score")


def lora(model: M, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, targets: Sequence[str] | None = None) -> M:
    """Add low-rank adapters beside a model's frozen weights, in place: only they are trained.

    rank: of each adapter
    alpha: adapters are scaled by alpha / rank
    dropout: of the adapters' inputs
    targets: last names of the linear layers to adapt; queries and values by default

    Also trains a classification head.  A is drawn from torch's global generator and B starts at zero, so the outputs do
    not change until training.  Returns the model.  Raises ValueError if the model does not have a target.
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
        with warnings.catch_warnings():  # peft warns when it detects that a weight is transposed
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ValueError(f"{type(model).__name__} cannot be adapted: {line(error)}") from error
    for name, module in model.named_modules():
        if name in _HEADS:
            module.requires_grad_(True)
    return model


def merged(model: M) -> M:
    """A copy of the model with its adapters merged into the weights, as fast as the model without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model


def _usual(model: nn.Module, known: Sequence[str]) -> list[str]:
    usual = next((list(names) for names in _USUAL if {*names} <= {*known}), None)
    if usual is None:
        names = ", ".join(known) or "none"
        raise ValueError(f"{type(model).__name__} has no usual layers to adapt; set lora.targets (there are {names})")
    return usual
