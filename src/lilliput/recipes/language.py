"""FSL-SAGE's language model: GPT-2 medium with LoRA on E2E NLG, cut after its first block (Nair et al., ICML 2025).

The settings are those of the published program: LoRA of rank 4 and alpha 32 on the fused queries, keys and values,
AdamW with lr 2e-4, batches of 8, a head of three blocks, alignments of 40 epochs over the newest 64 sequences.  The
program itself adapts only queries and values, warms up its learning rate, and counts frozen parameters as traffic.  Its
results are not published.
"""

from __future__ import annotations

from typing import Any

from lilliput.recipes.recipe import Case, Recipe, Version

_MEDIUM = {"model": "pretrained", "pretrained.source": "openai-community/gpt2-medium"}
_TINY = {"model": "gpt2", "gpt2.layers": 4, "gpt2.hidden": 128, "gpt2.heads": 4}
_CUT = {"cut.at": "1", "cut.tied": "frozen"}  # the head is tied to the device's embedding, which is frozen
_HEAD = {**_CUT, "auxiliary.depth": 3}
_SAGE = {"fsl_sage.align_interval": 10, "fsl_sage.align_batch_size": 8, "fsl_sage.memory_size": 64}
_METHODS: dict[str, dict[str, Any]] = {
    "FedAvg": {"algorithm": "fedavg", "optimizer_state": "keep"},
    "SplitFed v1": {"algorithm": "splitfed_v1", **_CUT},
    "SplitFed v2": {"algorithm": "splitfed_v2", **_CUT},
    "CSE-FSL": {"algorithm": "cse_fsl", "cse_fsl.server_update_interval": 5, **_HEAD},
    "FSL-SAGE": {
        "algorithm": "fsl_sage", "fsl_sage.server_update_interval": 5, "fsl_sage.align_epochs": 40, **_SAGE, **_HEAD,
    },
}  # fmt: skip

GPT2_E2E = Recipe(
    name="language/gpt2_medium_e2e",
    title="FSL-SAGE and its baselines, GPT-2 medium with LoRA on E2E NLG, 10 clients",
    source="FSL-SAGE's configuration; its numbers were not published",
    settings={
        "lora.rank": 4,
        "lora.alpha": 32,
        "lora.dropout": 0.1,
        "dataset": "e2e",
        "e2e.tokenizer": "gpt2",
        "e2e.length": 512,
        "partition": "iid",
        "clients": 10,
        "cohort": None,
        "rounds": 20,
        "local_epochs": 1,
        "batch_size": 8,
        "optimizer": "adamw",
        "optimizer_options": {"eps": 1e-6},
        "lr": 2e-4,
        "momentum": 0.0,
        "weight_decay": 0.01,
        "schedule": "constant",
        "evaluate": "server",
        "seed": 0,
    },
    metric="perplexity",
    note="E2E's files are named by e2e.folder; `lilliput evaluate --generate` scores what a run's model writes.",
    versions={
        "full": Version(
            [Case(name, {**_MEDIUM, **own}) for name, own in _METHODS.items()], "one GPU (estimated)", hours=60.0
        ),
        # One round of two steps on a small GPT-2 with random weights, to see that everything runs.
        "small": Version(
            [Case(name, {**_TINY, **own}) for name, own in _METHODS.items()], "2 CPU cores", hours=0.1,
            settings={"clients": 2, "rounds": 1, "local_steps": 2},
        ),
    },
)  # fmt: skip
