"""The patch: modules keep their weights and names and change their class, so that they keep less for the backward pass.

The class of each module is a subclass of the one it had, made on demand; deepcopy, pickle, state_dict, isinstance,
hooks, adapters and wrappers work as before.  What is not in the table stays as it is.
"""

from __future__ import annotations

from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

from lilliput.lean.formulas import GELU, LAYER_NORM, RMS_NORM, SWIGLU
from lilliput.lean.remake import product, remade
from lilliput.lean.tokens import cross_entropy

Model = TypeVar("Model", bound=nn.Module)
LABELS: ContextVar[Tensor | None] = ContextVar("labels", default=None)


class Lean(nn.Module):
    """Goes in front of a module's own class, `stock`."""

    stock: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class exists only here: what travels is what it is made of.
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return _new, (self.stock, type(self).__mro__[1]), *reduced[2:]


class Product(Lean):
    """nn.Linear whose input is made again if it can be."""

    weight: Tensor
    bias: Tensor | None
    transposed = False

    def forward(self, x: Tensor) -> Tensor:
        out = product(x, self.weight, self.bias, self.transposed)
        return super().forward(x) if out is None else out


class ProductTransposed(Product):
    """GPT-2's Conv1D: a linear layer with the weight [in, out]."""

    transposed = True


class Head(Product):
    """The last layer of a language model: gives the mean loss in place of logits while labels are set."""

    def forward(self, x: Tensor) -> Tensor:
        labels = LABELS.get()
        return super().forward(x) if labels is None else cross_entropy(x, self.weight, labels, self.bias)


class RmsNorm(Lean):
    """x / rms(x) times the weight, made again where a product needs it."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        return remade(RMS_NORM, x, self.weight, options=(self.variance_epsilon,))


class LayerNorm(Lean):
    """nn.LayerNorm with weight and bias, made again where a product needs it; without them as it is."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.bias is None:
            return super().forward(x)
        return remade(LAYER_NORM, x, self.weight, self.bias, options=(self.eps,))


class SwiGlu(Lean):
    """down(silu(gate(x)) * up(x)) of which the two factors are kept and not their product."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(remade(SWIGLU, self.gate_proj(x), self.up_proj(x)))


class Gelu(Lean):
    """nn.GELU, made again where a product needs it."""

    approximate = "none"

    def forward(self, x: Tensor) -> Tensor:
        return remade(GELU, x, options=(self.approximate,))


class GeluTanh(Gelu):
    """GPT-2's GELU by one kernel instead of eight operations: equal to 1e-6 in float32, better rounded in bfloat16."""

    approximate = "tanh"


# By name: transformers is not imported for their sake.  Others of its models differ in the formula (Gemma adds one to
# the weight), so a name is here once a test compares it with the stock module.
TABLE: dict[tuple[str, str], type[Lean]] = {
    ("torch", "Linear"): Product,
    ("torch", "LayerNorm"): LayerNorm,
    ("torch", "GELU"): Gelu,
    ("transformers", "Conv1D"): ProductTransposed,
    ("transformers", "NewGELUActivation"): GeluTanh,
    **{("transformers", f"{family}RMSNorm"): RmsNorm for family in ("Llama", "Mistral", "Qwen2", "Qwen3")},
    **{("transformers", f"{family}MLP"): SwiGlu for family in ("Llama", "Mistral", "Qwen2", "Qwen3")},
}
# Models whose logits are what their last layer gives, with nothing done to them after.
CAUSAL = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"}


def patch(model: Model) -> Model:
    """Make a model keep less for its backward pass, in place; its results stay the same.  Gives the model back.

    Norms, gated units, GELU, the inputs of the products that read them, and the loss of `lean.loss` are concerned, in
    LLaMA, Mistral, Qwen2, Qwen3 and GPT-2; in other models what they have in common with these.  May be called again
    after adapters were added.  Wrap the model (DDP, FSDP) after it.
    """
    head = _head(model)
    for module in model.modules():
        stock: Any = type(module)
        lean: Any = TABLE.get((stock.__module__.split(".")[0], stock.__name__))
        if lean is not None and (lean is not SwiGlu or _is_silu(module.act_fn)):
            module.__class__ = _class(stock, Head if module is head else lean)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`, in place.  Gives the model back."""
    for module in model.modules():
        if isinstance(module, Lean) and "stock" in vars(type(module)):
            module.__class__ = module.stock  # type: ignore[assignment]
    return model


def patched(model: nn.Module) -> bool:
    """Whether the loss of this language model can be had without its logits: `patch` knew the model."""
    return any(isinstance(module, Head) for module in model.modules())


def _head(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        if type(module).__name__ in CAUSAL and type(module).__module__.startswith("transformers."):
            return module.get_output_embeddings()  # type: ignore[operator]
    return None


def _is_silu(activation: Any) -> bool:
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


@cache
def _class(stock: Any, lean: Any) -> Any:
    return type(f"Lean{stock.__name__}", (lean, stock), {"stock": stock, "__module__": __name__})


def _new(stock: Any, lean: Any) -> Any:
    cls = _class(stock, lean)
    return cls.__new__(cls)
