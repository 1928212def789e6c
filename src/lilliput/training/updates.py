"""What turns gradients into new weights on a device: SGD, Adam and AdamW over lists of tensors, or any torch optimizer.

One object serves both step paths: all parameters at once (foreach kernels), or one at a time from a backward hook.
Its state is a value: `state()` gives a Body that `load()` takes back.  torch.optim is not touched until a user's own
optimizer asks for it, because its first use costs a second of imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lilliput import optim
from lilliput.core.tree import Body
from lilliput.optim import factory as optimizers


class Update(Protocol):
    """Applies gradients to the parameters it was made for.

    reads_weights: whether steps depend on the weights; decoupled: whether weight decay stays out of the gradient.
    """

    @property
    def reads_weights(self) -> bool: ...

    @property
    def decoupled(self) -> bool: ...

    def apply(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        """Update the parameters of these positions by these gradients, in place."""

    def state(self) -> Body: ...

    def load(self, state: Body) -> None: ...

    def weight(self, i: int, steps: int) -> float | None:
        """How far `steps` steps at lr 1 go against a gradient of one held constant; None for an adaptive optimizer.

        i: position of the parameter.  Weight decay is not part of it.  Of state that was loaded it tells what a
        gradient moves in the long run: a buffer that goes on from step to step passes on 1 / (1 - momentum) of it.
        """


class Sgd:
    """SGD with (Nesterov) momentum, dampening and coupled weight decay; arithmetic as in torch.optim.SGD."""

    decoupled = False
    reads_weights = property(lambda self: bool(self.weight_decay))

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False,
        dampening: float = 0.0,
    ):  # fmt: skip
        if nesterov and dampening:
            raise ValueError(f"nesterov goes without dampening, which is {dampening}; set dampening=0")
        self.params, self.lr = params, lr
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.dampening = dampening
        self._buffers: list[Tensor | None] = [None] * len(params)
        self._loaded: set[int] = set()

    def apply(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        params = [self.params[i] for i in indices]
        if self.weight_decay:
            grads = list(torch._foreach_add(grads, params, alpha=self.weight_decay))
        if self.momentum:
            grads = self._accumulate(indices, grads)
        torch._foreach_add_(params, grads, alpha=-self.lr)

    def _accumulate(self, indices: Sequence[int], grads: list[Tensor]) -> list[Tensor]:
        fresh = {i for i in indices if self._buffers[i] is None}
        for i, g in zip(indices, grads, strict=True):
            if i in fresh:  # a buffer starts as the first gradient, not as zero
                self._buffers[i] = torch.empty_like(self.params[i], requires_grad=False).copy_(g)
        buffers = [b for i in indices if (b := self._buffers[i]) is not None]
        old = [(b, g) for i, b, g in zip(indices, buffers, grads, strict=True) if i not in fresh]
        if old:
            torch._foreach_mul_([b for b, _ in old], self.momentum)
            torch._foreach_add_([b for b, _ in old], [g for _, g in old], alpha=1 - self.dampening)
        return list(torch._foreach_add(grads, buffers, alpha=self.momentum)) if self.nesterov else buffers

    def state(self) -> Body:
        return {str(i): b for i, b in enumerate(self._buffers) if b is not None}

    def load(self, state: Body) -> None:
        self._buffers = [_like(state.get(str(i)), p) for i, p in enumerate(self.params)]
        self._loaded = {i for i, b in enumerate(self._buffers) if b is not None}

    def weight(self, i: int, steps: int) -> float:
        return sgd_weight(steps, self.momentum, self.dampening, self.nesterov, i in self._loaded)


class Adam:
    """Adam with coupled weight decay, by torch's fused kernel."""

    kernel: Callable = staticmethod(torch._fused_adam_)
    decoupled = False
    reads_weights = property(lambda self: bool(self.weight_decay))

    def __init__(
        self,
        params: list[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.params, self.lr, self.betas, self.eps, self.weight_decay = params, lr, betas, eps, weight_decay
        # There from the start, so that the ledger sees it in every step; zeros are what a fresh optimizer has.
        self._m = [torch.zeros_like(p, requires_grad=False) for p in params]
        self._v = [torch.zeros_like(p, requires_grad=False) for p in params]
        self._steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p in params]

    def apply(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        steps = [self._steps[i] for i in indices]
        torch._foreach_add_(steps, 1)
        m, v = [self._m[i] for i in indices], [self._v[i] for i in indices]
        self.kernel(
            [self.params[i] for i in indices], grads, m, v, [], steps, lr=self.lr, beta1=self.betas[0],
            beta2=self.betas[1], weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    def state(self) -> Body:
        return {kind: {str(i): x for i, x in enumerate(xs)} for kind, xs in self._kinds().items()}

    def load(self, state: Body) -> None:
        """Take back a state; a parameter without an entry starts afresh."""
        for kind, xs in self._kinds().items():
            for i, x in enumerate(xs):
                x.copy_(state[kind][str(i)]) if str(i) in state[kind] else x.zero_()

    def _kinds(self) -> dict[str, list[Tensor]]:
        return {"m": self._m, "v": self._v, "step": self._steps}

    def weight(self, i: int, steps: int) -> None:
        return None


class AdamW(Adam):
    """Adam with decoupled weight decay."""

    kernel = staticmethod(torch._fused_adamw_)
    decoupled = True


class Wrapped:
    """Any torch.optim.Optimizer that was made for the parameters."""

    def __init__(self, optimizer: Any, params: list[Tensor], lr: float | None = None):
        """lr: of all its groups; None leaves them theirs."""
        self.params = params
        self._optimizer = optimizer
        for group in self._optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        self._loaded: set[int] = set()

    def apply(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        for i, grad in zip(indices, grads, strict=True):
            self.params[i].grad = grad
        try:
            self._optimizer.step()  # skips parameters that have no gradient
        finally:
            for i in indices:
                self.params[i].grad = None

    @property
    def reads_weights(self) -> bool:
        return optimizers.reads_weights(self._optimizer)

    @property
    def decoupled(self) -> bool:
        return optimizers.decouples(self._optimizer)

    def subspace(self) -> optim.SubspaceOptimizer:
        """The optimizer, if it trains in a subspace; raises ValueError otherwise."""
        if not isinstance(self._optimizer, optim.SubspaceOptimizer):
            raise ValueError(
                f"optimizer_state=average needs a subspace optimizer, not {type(self._optimizer).__name__}"
            )
        return self._optimizer

    def state(self) -> Body:
        return to_body(self._optimizer.state_dict()["state"])

    def load(self, state: Body) -> None:
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": {int(i): from_body(s) for i, s in state.items()}})
        self._loaded = {int(i) for i in state}

    def weight(self, i: int, steps: int) -> float | None:
        group = self._optimizer.param_groups[0]
        if type(self._optimizer) is not torch.optim.SGD or group["maximize"]:
            return None
        return sgd_weight(steps, group["momentum"], group["dampening"], group["nesterov"], i in self._loaded)


class Apart:
    """Two updates, each of some of the parameters; `second` are the positions of the other's."""

    def __init__(self, make: Callable[[list[Tensor], bool], Update], params: list[Tensor], second: Sequence[int]):
        both = [i for i in range(len(params)) if i not in second], list(second)
        self._updates = [make([params[i] for i in own], own is both[1]) for own in both]
        self._at = {i: (update, n) for update, own in zip(self._updates, both, strict=True) for n, i in enumerate(own)}
        self.decoupled = self._updates[0].decoupled
        self.reads_weights = any(update.reads_weights for update in self._updates)

    def apply(self, indices: Sequence[int], grads: list[Tensor]) -> None:
        for update in self._updates:
            own = [(self._at[i][1], g) for i, g in zip(indices, grads, strict=True) if self._at[i][0] is update]
            if own:
                update.apply([n for n, _ in own], [g for _, g in own])

    def state(self) -> Body:
        return {str(n): update.state() for n, update in enumerate(self._updates)}

    def load(self, state: Body) -> None:
        for n, update in enumerate(self._updates):
            update.load(state[str(n)])

    def weight(self, i: int, steps: int) -> float | None:
        update, n = self._at[i]
        return update.weight(n, steps)


def sgd_weight(steps: int, momentum: float, dampening: float, nesterov: bool, kept: bool) -> float:
    """`Update.weight` of SGD, whose buffer starts as its first gradient, or (kept) goes on from the round before."""
    if kept and 0 < momentum < 1:
        return steps * (1 - dampening) / (1 - momentum)
    buffer = total = 0.0
    for n in range(steps):
        buffer = momentum * buffer + (1 - dampening if n else 1.0)
        total += (1 + momentum * buffer if nesterov else buffer) if momentum else 1.0
    return total


def _like(x: Any, p: Tensor) -> Tensor | None:
    return None if x is None else torch.empty_like(p, requires_grad=False).copy_(x)  # in p's order of memory


def to_body(value: Any) -> Any:
    """Optimizer state as a Body: keys become strings, sequences numbered dicts."""
    if isinstance(value, dict):
        return {str(k): to_body(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return {"": type(value).__name__, **{str(i): to_body(v) for i, v in enumerate(value)}}
    return value


def from_body(value: Any) -> Any:
    """Optimizer state out of a Body; keys stay strings."""
    if not isinstance(value, dict):
        return value
    kind = value.get("")
    if kind in ("list", "tuple"):
        items = [from_body(value[str(i)]) for i in range(len(value) - 1)]
        return items if kind == "list" else tuple(items)
    return {k: from_body(v) for k, v in value.items()}


LISTS: dict[str, Callable[..., Any]] = {"sgd": Sgd, "adam": Adam, "adamw": AdamW}
OPTIMIZERS: dict[str, Callable[..., Any]] = {**optimizers.OPTIMIZERS, **LISTS}


def check(
    optimizer: str | Callable[..., Any], *, momentum: float, weight_decay: float, nesterov: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What an optimizer is made with besides its learning rate.

    Raises ValueError for an unknown optimizer or option, and for momentum given to one that takes its own through
    `options`.
    """
    target = optimizers.find(optimizer, OPTIMIZERS)
    given = optimizers.settled(optimizer, options, weight_decay, OPTIMIZERS)
    if target is Sgd:
        return {"momentum": momentum, "nesterov": nesterov, **given}
    if momentum or nesterov:
        raise ValueError(f"momentum is SGD's; pass what {optimizer} takes through optimizer_options")
    return given


def make(
    optimizer: str | Callable[..., Any], params: list[Tensor], lr: float, *, momentum: float, weight_decay: float,
    nesterov: bool, options: dict[str, Any], peak: float | None = None, model: nn.Module | None = None,
    undecayed: Sequence[int] = (),
) -> Update:  # fmt: skip
    """The update of this name, or of a user's own optimizer class.

    peak:  the learning rate that a schedule scales to `lr`; what an optimizer derives from its rate, such as that of
           online PCA, follows the schedule then.
    model: where the parameters are, which tells optimizers that project what is a layer and what an embedding.
    undecayed: positions of parameters that `weight_decay` is not for.
    Raises ValueError as `check` does.
    """
    if undecayed and (weight_decay or "weight_decay" in options):

        def some(own: list[Tensor], free: bool) -> Update:
            return make(
                optimizer, own, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, peak=peak,
                options={**options, "weight_decay": 0.0} if free else options, model=model,
            )  # fmt: skip

        return Apart(some, params, undecayed)
    given = check(optimizer, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, options=options)
    if not params:  # torch's optimizers refuse to have nothing to do
        return Sgd(params, lr)
    target = optimizers.find(optimizer, OPTIMIZERS)
    if target in LISTS.values():
        return target(params, lr, **given)
    return Wrapped(optimizers.build(optimizer, params, peak or lr, given, model, strict=False), params, lr)
