"""LLaMA pre-trained on C4 in a fraction of the memory: the tables of GaLore, APOLLO and Online Subspace Descent.

GaLore (Zhao et al., ICML 2024, https://arxiv.org/abs/2403.03507) gives sizes, ranks, steps and learning rates.  The
perplexities on C4's validation split are those that APOLLO (Zhu et al., MLSys 2025, https://arxiv.org/abs/2412.05270)
lists.  AdamW and LoRA were tuned per size, but their rates are not published; 0.001 is ours.  Fira and APOLLO use
GaLore's rate.  Online Subspace Descent (Liang et al., 2024, https://arxiv.org/abs/2408.12857) has its own table, of
10,000 steps.
"""

from __future__ import annotations

from typing import Any

from lilliput.recipes.recipe import Case, Recipe, Version

TOLERANCE = 0.03  # of a published perplexity
HARDWARE = "one GPU at 100 TFLOP/s, by arithmetic"
C4: dict[str, Any] = {
    "data": "c4", "tokenizer": "t5-base", "max_length": 256, "packing": False, "shuffle": 10_000, "batch_size": 512,
    "weight_decay": 0.0, "schedule": "cosine", "warmup": 0.1, "min_lr_ratio": 0.1, "dtype": "bf16", "seed": 0,
    "eval_every": 1000, "eval_tokens": "10M",
}  # fmt: skip


def _galore(rank: int, gap: int = 200) -> dict[str, Any]:
    return {"optimizer.rank": rank, "optimizer.update_proj_gap": gap, "optimizer.scale": 0.25}


def _case(name: str, published: float | None, optimizer: str, lr: float, **settings: Any) -> Case:
    tolerance = 0.0 if published is None else round(TOLERANCE * published, 2)
    return Case(name, {"optimizer": optimizer, "lr": lr, **settings}, published, tolerance, published)


def _hours(parameters: float, steps: int) -> float:
    """Hours of training, at 6 operations per parameter and token."""
    return round(6 * parameters * steps * 512 * 256 / 1e14 / 3600, 1)


def _table(size: str, parameters: float, rank: int, steps: int, published: dict[str, float]) -> Recipe:
    """One column of GaLore's table, with later methods."""
    subspace = _galore(rank)
    own = {"optimizer.rank": rank, "optimizer.update_proj_gap": 200}
    cases = [
        _case("AdamW", published["AdamW"], "adamw", 0.001),
        _case("GaLore", published["GaLore"], "galore_adamw", 0.01, **subspace),
        _case("LoRA", published["LoRA"], "adamw", 0.001, lora=rank),
        _case("8-bit AdamW", None, "adamw8bit", 0.001),
        _case("8-bit GaLore", None, "galore_adamw8bit", 0.01, **subspace),
        _case("GaLore-Adafactor", None, "galore_adafactor", 0.01, **subspace),
        _case("Online Subspace Descent", None, "online_subspace_adamw", 0.01, **subspace),
        _case("Online Subspace Descent SGD", None, "galore_adamw", 0.01,
              **{**subspace, "optimizer.proj_type": "continuous_sgd"}),
        _case("Fira", published["Fira"], "fira", 0.01, **subspace),
        _case("APOLLO", published["APOLLO"], "apollo", 0.01, **own, **{"optimizer.scale": 1.0}),
        _case("APOLLO-Mini", published["APOLLO-Mini"], "apollo_mini", 0.01,
              **{**own, "optimizer.rank": 1, "optimizer.scale": 128**0.5}),
    ]  # fmt: skip
    return Recipe(
        name=f"galore/llama_{size}", title=f"LLaMA-{size.upper()} on C4, {steps:,} steps, rank {rank}",
        source="GaLore, table 2; APOLLO, table 2", settings={"model": f"llama_{size}", **C4, "steps": steps},
        versions={"full": Version(cases, HARDWARE, _hours(parameters, steps))},
        metric="perplexity", command="pretrain",
    )  # fmt: skip


def _descent(size: str, parameters: float, full: float, galore: float, online: float) -> Recipe:
    """One column of Online Subspace Descent's table 1: 8-bit AdamW, rank 512."""
    subspace = {"optimizer.rank": 512, "optimizer.update_proj_gap": 200, "optimizer.scale": 0.25}
    cases = [
        _case("8-bit AdamW", full, "adamw8bit", 0.001),
        _case("GaLore", galore, "galore_adamw8bit", 0.001, **subspace),
        _case("Online Subspace Descent", online, "online_subspace_adamw8bit", 0.001, **subspace),
    ]
    return Recipe(
        name=f"online_subspace/llama_{size}", title=f"LLaMA-{size.upper()} on C4, 10,000 steps, rank 512, 8-bit AdamW",
        source="Online Subspace Descent, table 1",
        settings={"model": f"llama_{size}", **C4, "steps": 10_000, "clip": 1.0},
        versions={"full": Version(cases, HARDWARE, _hours(parameters, 10_000))},
        metric="perplexity", command="pretrain",
    )  # fmt: skip


def _seven_billion(name: str, title: str, note: str, published: tuple[float | None, ...], **own: Any) -> Recipe:
    """LLaMA-7B with 8-bit states, updates in the backward pass, and recomputed activations."""
    subspace = _galore(1024, 500)
    cases = [
        _case("8-bit AdamW", published[0], "adamw8bit", 0.0005),
        _case("8-bit GaLore", published[1], "galore_adamw8bit", 0.005, **subspace),
        _case("Online Subspace Descent", None, "galore_adamw8bit", 0.005,
              **{**subspace, "optimizer.proj_type": "continuous_sgd"}),
    ]  # fmt: skip
    lean = {"clip": 1.0, "per_layer": True, "checkpointing": True}
    return Recipe(
        name=name, title=title, source="GaLore, table 3", note=note,
        settings={"model": "llama_7b", **C4, "steps": 150_000, **lean, **own},
        versions={"full": Version(cases, HARDWARE, _hours(6.738e9, 150_000 * own.get("batch_size", 512) // 512))},
        metric="perplexity", command="pretrain",
    )  # fmt: skip


PRETRAINING = (
    _table("60m", 58.1e6, 128, 10_000,
           {"AdamW": 34.06, "GaLore": 34.88, "LoRA": 34.99, "Fira": 31.06, "APOLLO": 31.55, "APOLLO-Mini": 30.95}),
    _table("130m", 134.1e6, 256, 20_000,
           {"AdamW": 25.08, "GaLore": 25.36, "LoRA": 33.92, "Fira": 22.73, "APOLLO": 22.94, "APOLLO-Mini": 22.85}),
    _table("350m", 368.0e6, 256, 60_000,
           {"AdamW": 18.80, "GaLore": 18.95, "LoRA": 25.58, "Fira": 17.03, "APOLLO": 16.85, "APOLLO-Mini": 16.63}),
    _table("1b", 1.339e9, 512, 100_000,
           {"AdamW": 15.56, "GaLore": 15.64, "LoRA": 19.21, "Fira": 14.31, "APOLLO": 14.20, "APOLLO-Mini": 13.95}),
    _seven_billion("galore/llama_7b", "LLaMA-7B on C4, 150,000 steps, rank 1024, 8-bit states",
                   "It needs enough GPUs to take the batch in one pass, because accumulation keeps all gradients.",
                   (14.61, 14.65)),
    _seven_billion("galore/llama_7b_24gb", "LLaMA-7B on C4 on one GPU of 24 GB, rank 1024, 8-bit states",
                   "Batches of 16 in one pass: 23.3 GB by `lilliput memory`; 8-bit AdamW needs more than 24 GB.",
                   (None, None), batch_size=16),
    _descent("350m", 368.0e6, 30.43, 44.34, 43.67),
    _descent("1b", 1.339e9, 29.40, 35.52, 31.30),
)  # fmt: skip
