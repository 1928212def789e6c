"""The subspace optimizers by name: GaLore's and Online Subspace Descent's, over AdamW, Adafactor, Lion and 8-bit AdamW.

Groups are those that GaLore's users write, `{"params": …, "rank": 128, "update_proj_gap": 200, "scale": 0.25,
"proj_type": "std"}` beside ordinary ones, or `lilliput.optim.param_groups(model)`, or plain parameters with `rank=` as
an argument (matrices whose both sides exceed the rank are projected then).  `guard=False` trusts the gradients of what
is not projected and saves a pass over them.  `compat="official"` reproduces the
published programs.
"""

from __future__ import annotations

from typing import Any

from lilliput.optim.adafactor import ADAFACTOR
from lilliput.optim.adam import ADAM
from lilliput.optim.driver import SubspaceOptimizer
from lilliput.optim.lion import LION


class GaLoreAdamW(SubspaceOptimizer):
    """AdamW on projected gradients; exactly torch's AdamW for parameters without a rank.

    `compat="official"` adds eps outside of the bias correction, decays weights after the step, refreshes by SVD and
    lets torch's default weight decay pull P to zero in online PCA.
    """

    rule = ADAM

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = True,
        *,
        compat: str | None = None,
        states: str = "float32",
        **subspace: Any,
    ) -> None:
        super().__init__(
            params, subspace, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias,
            compat=compat, states=states,
        )  # fmt: skip


class GaLoreAdamW8bit(SubspaceOptimizer):
    """AdamW with moments in 8-bit block-wise codes: a quarter of their memory.

    Tensors below 4096 elements stay in float32.
    """

    rule = ADAM

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        compat: str | None = None,
        **subspace: Any,
    ) -> None:
        super().__init__(
            params, subspace, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, compat=compat, states="8bit"
        )


class GaLoreAdafactor(SubspaceOptimizer):
    """Adafactor: second moments as row and column means, the smallest state at full rank.

    Gradients are projected in groups with a rank.  `relative_step=True` needs no lr: it follows the step count.
    """

    rule = ADAFACTOR

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        warmup_init: bool = False,
        *,
        compat: str | None = None,
        states: str = "float32",
        **subspace: Any,
    ) -> None:
        if lr is not None and relative_step:
            raise ValueError(f"lr {lr} and relative_step=True exclude each other: give one of them")
        super().__init__(
            params, subspace, lr=1.0 if relative_step else lr, eps=eps, clip_threshold=clip_threshold,
            decay_rate=decay_rate, beta1=beta1, weight_decay=weight_decay, scale_parameter=scale_parameter,
            relative_step=relative_step, warmup_init=warmup_init, compat=compat, states=states,
        )  # fmt: skip


class GaLoreLion(SubspaceOptimizer):
    """Lion on projected gradients.  The sign is taken after the way back, so that `scale` has no effect on the step."""

    rule = LION

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        compat: str | None = None,
        states: str = "float32",
        **subspace: Any,
    ) -> None:
        super().__init__(params, subspace, lr=lr, betas=betas, weight_decay=weight_decay, compat=compat, states=states)


class Lion(GaLoreLion):
    """Lion: one moment instead of AdamW's two, for smaller learning rates than AdamW's.

    Weights decay before the step.  Groups with a rank are refused.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        states: str = "float32",
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, states=states)

    def add_param_group(self, group: dict[str, Any]) -> None:
        if group.get("rank") is not None:
            raise ValueError(f"Lion projects nothing, but a group has rank {group['rank']}: use GaLoreLion")
        super().add_param_group(group)
