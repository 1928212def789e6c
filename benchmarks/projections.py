"""Finding a subspace: warm power refresh and online PCA, compared with the decomposition of the published programs.

    python benchmarks/projections.py [--quick] [--device cuda] [--only refresh,pca] [--figure pca.png]

Prints JSON: CPU milliseconds (the device's on a GPU), the captured energy, and whether the goal holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
from torch import Tensor

from lilliput.lean.policy import fast, keep_freed_memory
from lilliput.optim import pca, projection
from lilliput.optim.projection import Projection, project
from optimizers import ATTENTION_AND_MLP, LAYERS, RANK, Clock, gradient

PUBLISHED = [(512, 1376), (1024, 2736), (2048, 5461), (4096, 11008)]  # where the papers time PCA against SVD
MOST, LEAST_ENERGY = 0.05, 0.995  # G10: time against the SVD, energy of what the SVD captures


def later(G: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient some steps later: G and noise of a fifth of its norm."""
    noise = torch.randn(G.shape, generator=generator).to(G.device)
    return G + noise * (0.2 * G.norm() / noise.norm())


def refreshes(turns: int, layers: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds to renew all projections: by galore-torch's decomposition, and by one warm power step.

    The gradient has moved since the last refresh; `energy` is relative to what the decomposition captures.
    """
    clock, generator = Clock(device), torch.Generator().manual_seed(1)
    first = [gradient(s, generator).to(device) for s in ATTENTION_AND_MLP * layers]
    second = [later(g, generator) for g in first]
    sides = ["right" if g.shape[0] >= g.shape[1] else "left" for g in first]
    old = [projection.gram(g, RANK, side) for g, side in zip(first, sides, strict=True)]

    def svd() -> list[Projection]:
        return [projection.svd(g, RANK, side) for g, side in zip(second, sides, strict=True)]

    def power() -> list[Projection]:
        with fast(device):
            return [projection.power(g, b) for g, b in zip(second, old, strict=True)]

    times: dict[str, list[float]] = {"svd": [], "power": []}
    for _ in range(turns):
        times["svd"].append(clock(svd))
        times["power"].append(clock(power))
    kept = [captured(bases, second) for bases in (power(), svd(), old)]
    ms = {name: round(1e3 * statistics.median(x), 2) for name, x in times.items()}
    return {
        "ms": ms,
        "energy_of_svd": round(kept[0] / kept[1], 5),
        "energy_of_svd_if_stale": round(kept[2] / kept[1], 5),
    }


def captured(projections: list[Projection], grads: list[Tensor]) -> float:
    """The share of the gradients' energy that the projections see."""
    seen = sum(float(project(g, P).square().sum()) for g, P in zip(grads, projections, strict=True))
    return seen / sum(float(g.square().sum()) for g in grads)


def online_pca(turns: int, device: torch.device, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """One step of online PCA, with its gradient by autograd and in closed form, against one SVD; rank m / 4."""
    clock, generator = Clock(device), torch.Generator().manual_seed(2)
    rows = []
    for m, n in shapes:
        G, rank = gradient((m, n), generator).to(device), m // 4
        P = projection.haar((m, n), rank, "left", torch.Generator().manual_seed(0), G)
        R, norm2 = project(G, P), G.square().sum()

        def closed(G: Tensor = G, R: Tensor = R, P: Projection = P, norm2: Tensor = norm2) -> Tensor:
            with fast(device):
                return pca.gradient(G, R, P, norm2)

        def autograd(G: Tensor = G, P: Projection = P, norm2: Tensor = norm2) -> Tensor:
            A = P.left.matrix.mT.clone().requires_grad_()  # type: ignore[union-attr]
            ((A @ A.T @ G - G).square().sum() / norm2).backward()
            return A.grad  # type: ignore[return-value]

        torch.testing.assert_close(closed(), autograd(), rtol=1e-3, atol=1e-5)
        svd_turns = 1 if m > 1024 and device.type == "cpu" else turns
        svd = [clock(lambda G=G: torch.linalg.svd(G, full_matrices=False)) for _ in range(svd_turns)]
        pairs = [(clock(closed), clock(autograd)) for _ in range(turns)]
        ms = [1e3 * statistics.median(x) for x in (svd, [a for a, _ in pairs], [b for _, b in pairs])]
        rows.append(
            {"shape": [m, n], "rank": rank, "svd_ms": round(ms[0], 2), "closed_ms": round(ms[1], 2),
             "autograd_ms": round(ms[2], 2), "svd_over_closed": round(ms[0] / ms[1], 1)}
        )  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]], device: torch.device, path: str) -> None:
    """The figure: milliseconds of one SVD and of one online-PCA step, by autograd and in closed form, per shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    ways = {"svd_ms": "torch SVD", "autograd_ms": "online PCA, autograd", "closed_ms": "online PCA, closed form"}
    for i, (key, label) in enumerate(ways.items()):
        axes.bar([x + 0.27 * (i - 1) for x in range(len(rows))], [row[key] for row in rows], 0.27, label=label)
    axes.set(yscale="log", ylabel=f"milliseconds on {device}", xlabel="gradient, rank a quarter of its smaller side")
    axes.set_xticks(range(len(rows)), ["{} x {}".format(*row["shape"]) for row in rows])
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers and the two smaller published shapes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="refresh,pca", help="parts, by comma")
    parser.add_argument("--figure", help="draw PCA against SVD into this file")
    arguments = parser.parse_args()
    device, parts = torch.device(arguments.device), arguments.only.split(",")
    torch.set_num_threads(1)
    keep_freed_memory()
    found: dict[str, Any] = {"device": str(device), "torch": torch.__version__}
    if "refresh" in parts:
        found["refresh"] = row = refreshes(2 if device.type == "cpu" else 9, 2 if arguments.quick else LAYERS, device)
        ratio = round(row["ms"]["power"] / row["ms"]["svd"], 3)
        row["G10"] = {"ratio": ratio, "most": MOST, "met": ratio <= MOST and row["energy_of_svd"] >= LEAST_ENERGY}
    if "pca" in parts:
        found["pca"] = online_pca(3, device, PUBLISHED[: 2 if arguments.quick else 4])
        if arguments.figure:
            draw(found["pca"], device, arguments.figure)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
