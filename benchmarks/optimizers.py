"""One optimizer step on LLaMA-60M: ours beside torch, galore-torch, bitsandbytes and torchao, taking turns.

    python benchmarks/optimizers.py [--quick] [--device cuda] [--only step,refresh,pca]

58.1 M parameters, of which 25.3 M in 56 attention and MLP matrices that are projected to rank 128; random gradients whose
spectrum decays, one thread.  Printed as JSON: CPU milliseconds per step (medians of turns), bytes of state, ratios and
whether the goals hold.  On a GPU the times are the device's.  A peer that is not installed is left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lilliput import optim
from lilliput.optim import basis, pca
from lilliput.optim.matmul import fast
from lilliput.optim.project import Basis, project

RANK = 128
HIDDEN, MLP, LAYERS, VOCABULARY = 512, 1376, 8, 32000
ATTENTION_AND_MLP = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN)] * 2 + [(HIDDEN, MLP)]
PUBLISHED = [(512, 1376), (1024, 2736), (2048, 5461), (4096, 11008)]  # where the papers time PCA against SVD

GOALS = {  # ratio: (numerator, denominator, at most)
    "G9 GaLore step / galore-torch": ("galore", "galore-torch", 0.33),
    "G9 GaLore step, bf16 products / galore-torch": ("galore bf16 products", "galore-torch", 0.24),
    "Online Subspace Descent / GaLore": ("online pca", "galore", 2.0),
    "G11 8-bit AdamW / bitsandbytes": ("adamw 8bit", "bitsandbytes adamw 8bit", 0.30),
    "not projected / torch AdamW fused": ("adamw", "torch adamw fused", 1.15),
}


class Clock:
    """CPU seconds of this process, or the device's seconds on a GPU."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, work: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            torch.cuda.synchronize()
            return time.perf_counter() - start
        start = time.process_time()
        work()
        return time.process_time() - start


def gradient(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise over a few strong directions, as gradients of language models have."""
    noise = torch.randn(shape, generator=generator) * 1e-3
    if len(shape) == 1:
        return noise
    strength = torch.arange(1, 33, dtype=torch.float32) ** -0.7
    left, right = (torch.randn(n, 32, generator=generator) / n**0.5 for n in shape)
    return noise + left * strength @ right.mT


class Llama(nn.Module):
    """The parameters of LLaMA-60M, without its forward."""

    def __init__(self, layers: int, vocabulary: int):
        super().__init__()
        self.matrices = nn.ParameterList(nn.Parameter(torch.zeros(s)) for s in ATTENTION_AND_MLP * layers)
        self.rest = nn.ParameterList(
            [nn.Parameter(torch.zeros(vocabulary, HIDDEN)) for _ in range(2)]
            + [nn.Parameter(torch.ones(HIDDEN)) for _ in range(2 * layers + 1)]
        )

    def fill_gradients(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.grad = gradient(tuple(p.shape), generator).to(device)


Make = Callable[[Llama], torch.optim.Optimizer]


def groups(model: Llama, **options: Any) -> list[dict[str, Any]]:
    own = {"rank": RANK, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std", **options}
    return [{"params": list(model.matrices), **own}, {"params": list(model.rest)}]


def contenders() -> dict[str, Make]:
    """Name: how to make it."""
    adamw = torch.optim.AdamW
    made: dict[str, Make] = {
        "torch adamw fused": lambda m: adamw(m.parameters(), lr=1e-3, fused=True),
        "torch adamw": lambda m: adamw(m.parameters(), lr=1e-3),
        "adamw": lambda m: optim.GaLoreAdamW(m.parameters(), lr=1e-3),
        "adamw bf16": lambda m: optim.GaLoreAdamW(m.parameters(), lr=1e-3, states="bf16"),
        "adamw 8bit": lambda m: optim.GaLoreAdamW8bit(m.parameters(), lr=1e-3),
        "galore": lambda m: optim.GaLoreAdamW(groups(m), lr=1e-3),
        "galore bf16 products": lambda m: optim.GaLoreAdamW(groups(m, precision="bf16"), lr=1e-3),
        "galore 8bit": lambda m: optim.GaLoreAdamW8bit(groups(m), lr=1e-3),
        "galore seeded": lambda m: optim.GaLoreAdamW(groups(m, proj_type="seeded"), lr=1e-3),
        "fira": lambda m: optim.GaLoreAdamW(groups(m, update="fira"), lr=1e-3),
        "apollo": lambda m: optim.GaLoreAdamW(groups(m, update="apollo"), lr=1e-3),
        "online pca": lambda m: optim.GaLoreAdamW(groups(m, proj_type="continuous", update_proj_gap=200), lr=1e-3),
        "galore adafactor": lambda m: optim.GaLoreAdafactor(groups(m), lr=1e-3),
        "galore lion": lambda m: optim.GaLoreLion(groups(m), lr=1e-3),
    }
    with suppress(ImportError, AttributeError):
        muon = torch.optim.Muon
        made["torch muon"] = lambda m: muon(list(m.matrices), lr=1e-3)
    with suppress(ImportError):
        import galore_torch

        made["galore-torch"] = lambda m: galore_torch.GaLoreAdamW(groups(m), lr=1e-3)
    with suppress(ImportError):
        import bitsandbytes

        made["bitsandbytes adamw 8bit"] = lambda m: bitsandbytes.optim.AdamW8bit(m.parameters(), lr=1e-3)
    with suppress(ImportError):
        from torchao.optim import AdamW8bit

        made["torchao adamw 8bit"] = lambda m: AdamW8bit(m.parameters(), lr=1e-3)
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """All tensors of the state; those inside objects (galore-torch's projector) by their attributes."""

    def size(x: Any) -> int:
        if isinstance(x, Tensor):
            inner = [getattr(x, name, None) for name in getattr(x, "tensor_attrs", ())]
            return sum(t.nbytes for t in inner if isinstance(t, Tensor)) or x.nbytes
        if hasattr(x, "ortho_matrix"):
            return size(x.ortho_matrix)
        return 0

    return sum(size(x) for state in optimizer.state.values() for x in state.values())


def steps(names: list[str], turns: int, layers: int, vocabulary: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Milliseconds per step of each contender: turns times one step of each, after a warm-up of two steps."""
    clock, everyone = Clock(device), {}
    model = Llama(layers, vocabulary).to(device)
    model.fill_gradients(device)
    for name, make in contenders().items():
        if not names or name in names:
            optimizer = make(model)
            first = clock(optimizer.step)
            optimizer.step()
            everyone[name] = (optimizer, first, [])
            gc.collect()
    for _ in range(turns):
        for optimizer, _, times in everyone.values():
            times.append(clock(optimizer.step))
    return {
        name: {
            "ms": round(1e3 * statistics.median(times), 2),
            "least_ms": round(1e3 * min(times), 2),
            "first_ms": round(1e3 * first, 1),
            "state_mb": round(state_bytes(optimizer) / 1e6, 1),
        }
        for name, (optimizer, first, times) in everyone.items()
    }
