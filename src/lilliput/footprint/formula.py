"""What a training step of a LLaMA, Mistral or Qwen needs, by formulas: at once, whatever its size.

Most is needed at one of a few moments of a step, and the formulas say which kinds of tensors are there at each.  State
is counted exactly (`optim.memory`).  What the forward pass keeps of each token and layer depends on the hidden size h,
the width f of the feed-forward layers, and the width a of attention, which is heads x head size:

    float32: 6 numbers of h (two norms, 3 each), 4 of a (q, k, v, attention's output), 4 of f (gate, silu, up, product)
    bf16:    the same in 2 bytes, but that a norm keeps its input in float32: 8 h + 4 a + 4 f numbers of 2 bytes

Keys and values of grouped-query attention count at the full width: attention repeats them for its heads, and keeps
them so.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from torch import Tensor, nn

from lilliput import lean, optim
from lilliput.footprint.result import KINDS, Footprint
from lilliput.footprint.scratch import scratch
from lilliput.footprint.setting import Setting
from lilliput.footprint.trace import PROJECTIONS
from lilliput.lean.tokens import CHUNK as LEAN_LOGITS
from lilliput.lean.tokens import STRIPE
from lilliput.optim.options import matrix_shape, ranked
from lilliput.optim.subspace import seen_shape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Bytes that the forward pass keeps of a token in a layer, by weights' dtype and whether layers are lean: times h, for
# two norms; times a; times f; and in addition.  Under autocast ("mixed") norms and rotary embeddings stay in float32.
KEPT = {
    ("float32", False): (24, 16, 16, 8), ("bf16", False): (16, 8, 8, 8), ("mixed", False): (24, 18, 8, 8),
    ("float32", True): (8, 16, 8, 0), ("bf16", True): (4, 8, 4, 0), ("mixed", True): (8, 16, 4, 0),
}  # fmt: skip
WIDE = 4  # bytes of the numbers in which losses, norms and updates are computed
Moment = dict[str, int]


def estimate(setting: Setting, model: nn.Module) -> Footprint | None:
    """The footprint of a setting whose module this is, on the meta device; None if no formula covers it."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES or not hasattr(config, "num_key_value_heads"):
        return None
    window = getattr(config, "sliding_window", None)
    if window is not None and window < setting.tokens(model):  # attention needs a mask
        return None
    optimizer = setting.made(model)
    if not isinstance(optimizer, optim.SubspaceOptimizer) or setting.padded or setting.subspace is not None:
        return None
    memory = optim.memory(model, optimizer)
    projections = sum(memory.states.get(name, 0) for name in PROJECTIONS)
    always = {
        "weights": memory.parameters + memory.buffers,
        "states": memory.state - projections,
        "projections": projections,
    }
    moments = [{**dict.fromkeys(KINDS, 0), **always, **m} for m in _Step(setting, model, optimizer).moments()]
    largest = {kind: max(m[kind] for m in moments) for kind in KINDS}
    at_peak = max(moments, key=lambda m: sum(m.values()))
    return Footprint(**largest, at_peak=at_peak, parameters=sum(p.numel() for p in model.parameters()), certified=False)


class _Step:
    """The moments of one step."""

    def __init__(self, setting: Setting, model: nn.Module, optimizer: optim.SubspaceOptimizer):
        config: Any = model.config
        self.setting, self.lean = setting, lean.patched(model)
        self.h, self.f, self.heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or self.h // self.heads
        self.a, self.kv = self.heads * head, config.num_key_value_heads * head
        self.normed = self.a + self.kv if config.model_type == "qwen3" else 0  # q and k have norms of their own
        self.layers, self.vocabulary = config.num_hidden_layers, config.vocab_size
        self.tokens = setting.batch_size // setting.accumulate * setting.tokens(model)
        self.width = 2 if setting.autocast or setting.dtype == "bf16" else WIDE  # bytes of what matrix products read
        self.trained = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        self.every = sum(p.nbytes for p, _ in self.trained)
        self.head = model.get_output_embeddings().weight  # type: ignore[operator]
        self.scratch = scratch(optimizer, setting.device)

    def moments(self) -> Iterator[Moment]:
        """What is there when most can be: at the loss, in the last layer, in the first, and at the update."""
        kept, layer = self._kept(), self._layer()
        again = layer if self.setting.checkpointing else 0  # recomputed
        passing = self.tokens * 2 * (self.f + self.h) * self.width  # gradients on their way through a layer
        before = self._accumulated()
        yield {"activations": kept + self._loss(), "gradients": before}
        if self.setting.per_layer:
            for p, activations in ((self.head, kept), (self._largest_inside(), kept + again + passing)):
                gradient = p.nbytes if p.requires_grad else 0
                yield {"activations": activations, "gradients": before + gradient, "scratch": self.scratch.get(p, 0)}
            return
        outside = self.head.nbytes if self.head.requires_grad else 0  # of the head; the embedding's is as large
        yield {"activations": kept + again + passing, "gradients": max(before, outside)}
        yield {"activations": layer + passing, "gradients": max(before, self.every - outside)}
        yield {"gradients": self.every, "scratch": self._update()}

    def _layer(self) -> int:
        """What a layer keeps for its backward pass, bfloat16 copies of weights under autocast included."""
        by_h, by_a, by_f, more = KEPT["mixed" if self.setting.autocast else self.setting.dtype, self.lean]
        copies = 0
        if self.setting.autocast:  # lean layers make those of all but one matrix again
            rest = 0 if self.lean else self.h * (self.a + 2 * self.kv + 3 * self.f)
            copies = 2 * (self.h * self.a + rest)
        adapters = 7 * self.width * (self.setting.lora or 0)  # what goes between their two matrices
        output = 0 if self.lean else 2 if self.setting.dtype == "bf16" else WIDE  # rotary embeddings do not keep it
        norms = by_h * self.h + (by_h // 2 - output) * self.normed
        attention = by_a * self.a + 4 * self.heads
        return self.tokens * (norms + attention + by_f * self.f + more + adapters) + copies

    def _kept(self) -> int:
        """What all layers and the last norm keep, or the layers' inputs alone."""
        residual = 2 if self.setting.dtype == "bf16" else WIDE
        inputs = self.tokens * self.h * residual
        own = inputs if self.setting.checkpointing else self._layer()
        norm = 0 if self.lean else self.tokens * self.h * (2 * self.width + WIDE - residual)
        return self.layers * own + inputs + norm

    def _loss(self) -> int:
        """The logits' logarithms and two gradients of theirs; lean, those of a chunk, and the head's gradient early."""
        cast = 2 * self.vocabulary * self.h  # bytes of a bfloat16 copy of the head
        copies = cast if self.setting.autocast else 0
        if not self.lean:
            return 3 * WIDE * self.tokens * self.vocabulary + copies
        early = WIDE * self.h * (self.tokens + (self.vocabulary if self.head.requires_grad else 0))
        logits = min(LEAN_LOGITS, self.tokens * self.vocabulary)
        if self.width == WIDE:
            return early + logits * 2 * WIDE
        stripe = 2 * min(STRIPE, self.vocabulary) * self.h
        adding = stripe * (3 if self.setting.device == "cpu" else 1)  # a CPU copies what it adds into the wider dtype
        return early + copies + max(logits * (2 + 2 * WIDE), logits * (2 + WIDE) + adding)

    def _accumulated(self) -> int:
        """Gradients of earlier passes: of all weights, since where a new subspace is due they are needed whole."""
        return self.every if self.setting.accumulate > 1 else 0

    def _largest_inside(self) -> Tensor:
        """The matrix of a layer whose update takes most."""
        inside = [p for p, _ in self.trained if self.vocabulary not in p.shape]
        return max(inside, key=lambda p: p.nbytes + self.scratch[p])

    def _update(self) -> int:
        """The scratch of an update of all: an accelerator sees all gradients of a group before it moves any weight."""
        alone = max((self.scratch[p] for p, group in self.trained if not ranked(group)), default=0)
        projected = [(self.scratch[p], WIDE * prod(_seen(p, group))) for p, group in self.trained if ranked(group)]
        together = sum(seen for _, seen in projected) if self.setting.device != "cpu" else 0
        return max(alone, together + max((own for own, _ in projected), default=0))


def _seen(p: Tensor, group: dict[str, Any]) -> tuple[int, int]:
    return seen_shape(matrix_shape(p), group)
