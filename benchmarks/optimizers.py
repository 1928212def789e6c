"""One optimizer step on LLaMA-60M: ours, torch, galore-torch, bitsandbytes and torchao take turns.

    python benchmarks/optimizers.py [--quick] [--device cuda] [--as-shipped] [--contenders galore,adamw]

58.1 M parameters, of which 25.3 M are in 56 attention and MLP matrices that are projected to rank 128; random gradients
whose spectrum decays, one thread.  Prints JSON: CPU milliseconds per step (medians of turns), bytes of state, ratios
and whether the goals hold.  On a GPU the times are the device's.  Skips peers that are not installed.
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
from lilliput.lean.policy import fast, keep_freed_memory

RANK = 128
HIDDEN, MLP, LAYERS, VOCABULARY = 512, 1376, 8, 32000
ATTENTION_AND_MLP = [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN)] * 2 + [(HIDDEN, MLP)]

GOALS = {  # ratio: (numerator, denominator, at most)
    "G9 GaLore step / galore-torch": ("galore", "galore-torch", 0.33),
    "G9 GaLore step, bf16 products / galore-torch": ("galore bf16 products", "galore-torch", 0.24),
    "Online Subspace Descent / GaLore": ("online pca", "galore", 2.0),
    "G11 8-bit AdamW / bitsandbytes": ("adamw 8bit", "bitsandbytes adamw 8bit", 0.30),
    "not projected / torch AdamW fused": ("adamw", "torch adamw fused", 1.15),
    "not projected, unguarded / torch AdamW fused": ("adamw unguarded", "torch adamw fused", 1.05),
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
    """Directions of strength i^-0.7, similar to gradients of language models."""
    if len(shape) == 1 or shape[0] > 16 * HIDDEN:
        return torch.randn(shape, generator=generator) * 1e-3
    strength = torch.arange(1, min(shape) + 1, dtype=torch.float32) ** -0.7
    left, right = (torch.randn(n, len(strength), generator=generator) / n**0.5 for n in shape)
    return left * strength @ right.mT


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
    """{name: a function that makes it}, without peers that are not installed."""
    adamw = torch.optim.AdamW
    made: dict[str, Make] = {
        "torch adamw fused": lambda m: adamw(m.parameters(), lr=1e-3, fused=True),
        "torch adamw": lambda m: adamw(m.parameters(), lr=1e-3),
        "adamw": lambda m: optim.GaLoreAdamW(m.parameters(), lr=1e-3),
        "adamw unguarded": lambda m: optim.GaLoreAdamW(m.parameters(), lr=1e-3, guard=False),
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
    """The bytes of all tensors of the state, including attributes of objects (galore-torch's projector)."""

    def size(x: Any) -> int:
        if isinstance(x, Tensor):
            inner = [getattr(x, name, None) for name in getattr(x, "tensor_attrs", ())]
            return sum(t.nbytes for t in inner if isinstance(t, Tensor)) or x.nbytes
        if hasattr(x, "ortho_matrix"):
            return size(x.ortho_matrix)
        return 0

    return sum(size(x) for state in optimizer.state.values() for x in state.values())


def steps(
    names: list[str], turns: int, layers: int, vocabulary: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Milliseconds per step of each contender: `turns` rounds of one step each, after a warm-up of two steps."""
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


def floor_ms(layers: int, vocabulary: int, device: torch.device) -> float:
    """The least time of a projected step here: its two products and one pass over the unprojected parameters."""
    clock = Clock(device)
    shapes = ATTENTION_AND_MLP * layers
    work = []
    for m, n in shapes:
        G, small = torch.randn(m, n, device=device), (RANK, n) if m >= n else (m, RANK)
        P, out = torch.randn(small, device=device), torch.empty((m, RANK) if m >= n else (RANK, n), device=device)
        work.append(((G, P.T, out, P) if m >= n else (P.T, G, out, P), m >= n, torch.zeros(m, n, device=device)))

    def products() -> None:
        with fast(device):
            for (a, b, out, P), right, W in work:
                torch.mm(a, b, out=out)
                W.addmm_(*((out, P) if right else (P, out)), alpha=1e-9)

    rest = [torch.zeros(vocabulary * HIDDEN * 2, device=device) for _ in range(4)]
    step = [torch.ones((), device=device)]

    def adam() -> None:
        torch._fused_adamw_(
            *([x] for x in rest), [], step, lr=1e-9, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip

    products(), adam()
    return round(1e3 * min(clock(products) + clock(adam) for _ in range(5)), 2)


def goals(found: dict[str, Any]) -> dict[str, Any]:
    """Each goal with the ratio that was measured."""
    table: dict[str, Any] = {}
    ms = {name: row["ms"] for name, row in found.get("step", {}).items()}
    for goal, (ours, theirs, most) in GOALS.items():
        if ours in ms and theirs in ms:
            table[goal] = {"ratio": round(ms[ours] / ms[theirs], 3), "most": most}
    if "galore" in ms:
        table["G9 GaLore step / floor"] = {"ratio": round(ms["galore"] / found["floor_ms"], 3), "most": 1.35}
    return {name: {**row, "met": row["ratio"] <= row["most"]} for name, row in table.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, a small vocabulary, three turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--as-shipped", action="store_true", help="without keeping freed memory, which helps everyone")
    parser.add_argument("--contenders", default="", help="of the step, by comma; all of them by default")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    if not arguments.as_shipped:
        keep_freed_memory()
    layers, vocabulary, turns = (2, 4000, 3) if arguments.quick else (LAYERS, VOCABULARY, 9)
    found: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "layers": layers}
    found["floor_ms"] = floor_ms(layers, vocabulary, device)
    names = [name for name in arguments.contenders.split(",") if name]
    found["step"] = steps(names, turns, layers, vocabulary, device)
    print(json.dumps({**found, "goals": goals(found)}, indent=2))


if __name__ == "__main__":
    main()
