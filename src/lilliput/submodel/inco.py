"""InCo Aggregation (Chan et al., 2023, https://arxiv.org/abs/2308.11464): deep layers learn from shallow ones.

At the server, the change of each deep layer is mixed with that of a shallow layer of the same shape in the same stage.
A change g points downhill: new weights minus old ones.  With g_k of the deep layer, g_0 of the shallow one, n_k and
n_0 their norms, hats for division by the norm, and c the cosine between them:

    theorem     g_k, or if <g_k, g_0> < 0 its projection g_k - (<g_k, g_0> / n_0^2) g_0     (Theorem 3.1)
    algorithm1  (n_k + n_0) / 2 (ghat_k - <g_k, g_0> / n_0^2 ghat_0)                        (Algorithm 1, line 9)
    published   (n_k + n_0) / 2 (ghat_k + min(|<g_k, g_0>| / n_0^2, ceiling) ghat_0), each entry within 0.1
    normalised  (n_k + n_0) / 2 (ghat_k + |c| ghat_0)

The published program differs from the paper: its coefficient is never negative.  `theorem` and `normalised` never
oppose g_k or g_0; the others may.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lilliput.core import tree
from lilliput.core.tree import Tree
from lilliput.submodel.combine import Mean

Mode = Literal["published", "theorem", "algorithm1", "normalised"]

LIMIT = 0.1  # the largest entry of a published mix
EPSILON = 1e-7  # what the published program adds to a divisor
# Shortcuts have the shape of a convolution beside them, and are no layer of the stage.
_BLOCK = re.compile(r"^(?P<stage>(?:.*?\.)?)(?P<block>\d+)\.(?P<rest>(?!.*(?:downsample|shortcut)).*weight)$")
# Two norms of a transformer's block, by the names of timm, of our models, of ViT and of GPT-2.
_NORMS = {"norm2": "norm1", "layernorm_after": "layernorm_before", "ln_2": "ln_1"}


@dataclass(frozen=True)
class InCo(Mean):
    """Mixes the changes of deep layers with those of shallow ones: for clients that hold models of different depth.

    weight:   how clients are averaged before: by their labels that count, or equally, as the paper does.
    mode:     the formula of the mix: published, theorem, algorithm1 or normalised.
    ceiling:  the largest coefficient of the published mix.
    matrices: also mix the matrices of equal layers of a stage, row by row, which the paper does not.
    """

    mode: Mode = "published"
    ceiling: float = 5.0
    matrices: bool = False

    def __post_init__(self) -> None:
        if self.mode not in _COEFFICIENTS:
            raise ValueError(f"mode {self.mode!r} is unknown; choose one of {', '.join(_COEFFICIENTS)}")
        if not self.ceiling >= 0:
            raise ValueError(f"ceiling is {self.ceiling}; it must not be negative")

    def finished(self, delta: Tree) -> Tree:
        """The change of the global model, mixed."""
        return mix(delta, self.mode, self.ceiling, self.matrices)


def mix(deltas: Tree, mode: Mode = "published", ceiling: float = 5.0, matrices: bool = False) -> Tree:
    """The changes of a model, by parameter name, with those of deep layers mixed; all others are the same tensors.

    The unit of a mix is a kernel of a convolution, a row of a matrix or of a 1x1 convolution, or a whole vector.  An
    entry of a row or a vector that nothing changed stays unchanged.  A unit stays as it is if either of its two changes
    is zero, except in mode "published", which then halves the other one.
    """
    coefficients, seen = _COEFFICIENTS[mode], dict[str, tuple[Tensor, Tensor]]()
    out = dict(deltas)
    for deep, shallow in pairs(deltas, matrices).items():
        if shallow not in seen:
            g0 = _units(deltas[shallow])
            seen[shallow] = g0, _products(g0, g0)
        g, (g0, a) = _units(deltas[deep]), seen[shallow]
        p, q = coefficients(_Products(a, _products(g0, g), a.sqrt(), _products(g, g).sqrt()), ceiling)
        mixed = (g * p[:, None]).addcmul_(g0, q[:, None])
        if mode == "published":
            mixed.clamp_(-LIMIT, LIMIT)
        if not _has_kernels(deltas[deep]):  # a slice may leave out a part of a row, but not of a kernel
            mixed.masked_fill_(g == 0, 0.0)
        out[deep] = mixed.view(deltas[deep].shape).to(deltas[deep].dtype)
    return out


def pairs(deltas: Tree, matrices: bool = False) -> dict[str, str]:
    """Which parameters are mixed: the name of each deep one -> that of its shallow one.

    A stage is a list of blocks, `<stage>.<number>.<rest>` by name.  The shallow convolution of a shape is the last one
    of the first block that has the shape; all of later blocks are mixed with it.  The second norm of a transformer's
    block is mixed with the block's first one.  Of matrices, the shallow one is the first block's of the same `rest`.
    """
    first: dict[Any, tuple[int, str]] = {}
    out: dict[str, str] = {}
    blocks = [(int(m["block"]), name, m) for name in deltas if (m := _BLOCK.match(name))]
    for block, name, m in sorted(blocks, key=lambda found: found[0]):
        x = deltas[name]
        if x.dim() == 1:
            stem, _, last = m["rest"].removesuffix(".weight").rpartition(".")
            before = name.replace(f"{last}.weight", f"{_NORMS.get(last, last)}.weight")
            if not stem and before != name and before in deltas and deltas[before].shape == x.shape:
                out[name] = before
            continue
        if x.dim() == 2 and not matrices:
            continue
        key = (m["stage"], tuple(x.shape), m["rest"] if x.dim() == 2 else "")
        if key not in first or first[key][0] == block:
            first[key] = block, name
        else:
            out[name] = first[key][1]
    return out


class _Products(NamedTuple):
    """Of each unit: the squared norm of the shallow change, the inner product, and both norms."""

    a: Tensor
    b: Tensor
    n0: Tensor
    nk: Tensor


def _products(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of each unit; by a vector of ones, which is twice as fast as torch's sum over few entries."""
    return torch.mv(x * y, x.new_ones(x.shape[1]))


def _theorem(u: _Products, ceiling: float) -> tuple[Tensor, Tensor]:
    return torch.ones_like(u.a), (-u.b / u.a).where((u.b < 0) & (u.a > 0), 0.0)


def _algorithm1(u: _Products, ceiling: float) -> tuple[Tensor, Tensor]:
    return _averaged(u, -u.b / u.a)


def _normalised(u: _Products, ceiling: float) -> tuple[Tensor, Tensor]:
    return _averaged(u, u.b.abs() / (u.n0 * u.nk))


def _averaged(u: _Products, t: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients of ghat_k + t ghat_0 at the mean of both norms; 1 and 0 where either change is zero."""
    half, both = (u.nk + u.n0) / 2, (u.n0 > 0) & (u.nk > 0)
    return (half / u.nk).where(both, 1.0), (half * t / u.n0).where(both, 0.0)


def _published(u: _Products, ceiling: float) -> tuple[Tensor, Tensor]:
    half, t = (u.nk + u.n0) / 2, (u.b.abs() / (u.a + EPSILON)).clamp(max=ceiling)
    return half / (u.nk + EPSILON), half * t / (u.n0 + EPSILON)


_COEFFICIENTS: dict[str, Callable[[_Products, float], tuple[Tensor, Tensor]]] = {
    "published": _published, "theorem": _theorem, "algorithm1": _algorithm1, "normalised": _normalised,
}  # fmt: skip


def _has_kernels(x: Tensor) -> bool:
    return x.dim() > 2 and x[0, 0].numel() > 1


def _units(x: Tensor) -> Tensor:
    """The units of a parameter [units, entries], in float32 at least."""
    return tree.wide(x).reshape((-1, x[0, 0].numel()) if _has_kernels(x) else (1, -1) if x.dim() == 1 else (len(x), -1))
