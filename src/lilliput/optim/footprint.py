"""Where the bytes of training are: weights, gradients and every kind of optimizer state.

State that does not exist yet, before the first step, is counted as it will be.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from lilliput.optim.driver import SubspaceOptimizer
from lilliput.optim.states import MAXIMA


@dataclass(frozen=True)
class Memory:
    """Bytes by kind; `states` by the name of the state tensor, 8-bit codes and their maxima together.

    gradients: all of them at once; with per-layer updates only `largest_gradient` of these exists at a time.
    """

    parameters: int
    buffers: int
    gradients: int
    largest_gradient: int
    states: dict[str, int]
    projected: int  # of the states, those of projected matrices
    undivided: int  # what AdamW would keep for the same trainable weights, in their own dtype

    @property
    def state(self) -> int:
        """All optimizer state."""
        return sum(self.states.values())

    @property
    def total(self) -> int:
        """Weights, buffers, all gradients and all optimizer state; activations are not in it."""
        return self.parameters + self.buffers + self.gradients + self.state

    def __str__(self) -> str:
        rows = {"parameters": self.parameters, "buffers": self.buffers, "gradients": self.gradients}
        rows |= {f"state {name}": size for name, size in self.states.items()}
        rows |= {"total": self.total, "(state of AdamW)": self.undivided}
        return "\n".join(f"{name:<28}{size / 1e6:>12.1f} MB" for name, size in rows.items())


def memory(model: nn.Module, optimizer: SubspaceOptimizer) -> Memory:
    """The bytes of a model trained by this optimizer."""
    trained = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    states: dict[str, int] = {}
    projected = 0
    for p, group in trained:
        for name, size in _state_bytes(optimizer, p, group).items():
            states[name.removesuffix(MAXIMA)] = states.get(name.removesuffix(MAXIMA), 0) + size
            projected += size if group.get("rank") is not None else 0
    sizes = [p.nbytes for p, _ in trained]
    return Memory(
        parameters=sum(p.nbytes for p in model.parameters()),
        buffers=sum(b.nbytes for b in model.buffers()),
        gradients=sum(sizes),
        largest_gradient=max(sizes, default=0),
        states=states,
        projected=projected,
        undivided=2 * sum(sizes),
    )


def _state_bytes(optimizer: SubspaceOptimizer, p: Tensor, group: dict[str, Any]) -> dict[str, int]:
    tensors = {name: x for name, x in optimizer.state.get(p, {}).items() if isinstance(x, Tensor)}
    if "step" in optimizer.state.get(p, {}):
        return {name: x.nbytes for name, x in tensors.items()}
    return {name: prod(shape) * dtype.itemsize for name, (shape, dtype) in optimizer.layout(p, group).items()}
