"""The options of the published programs, one table for each, and what they are here.

What is read of them, what is refused and the tables of the README come from here; names of methods are in `axes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

OFF = object()  # in place of a value: as if the option had not been typed


def same(value: Any) -> Any:
    """The value of an option that takes what ours takes."""
    return value


class Option(NamedTuple):
    """One row: an option, or several with a comma between.

    keys:    as the program has them.
    ours:    the setting that they are, or one for each; what the README says where they are not read by name.
    note:    what to know of it; of a refused one what to write instead.
    value:   its value in ours.
    kind:    read; lenient: read, and ignored where it has no use, as the program does; refused, with the note;
             idle: read, does nothing, and the note says why; told: the README says what became of it.
    """

    keys: str
    ours: str = ""
    note: str = ""
    value: Callable[[Any], Any] = same
    kind: Literal["read", "lenient", "refused", "idle", "told"] = "read"

    def names(self) -> list[str]:
        """Its keys one by one."""
        return self.keys.split(", ")

    def settings(self) -> Iterator[tuple[str, str]]:
        """(key, the setting that it is)."""
        ours = self.ours.split(", ")
        yield from zip(self.names(), ours if len(ours) > 1 else ours * len(self.names()), strict=True)

    def said(self) -> str:
        """The note without its marks."""
        return self.note.replace("`", "")


def _auto(factors: Any) -> str:
    """FSL-SAGE's weights of clients: `auto`, which is by examples."""
    if factors != "auto":
        raise ValueError(
            f"agg_factor={factors} is not auto, which is by examples; for equal weights write combine=uniform_mean"
        )
    return "weighted_mean"


def _share(ratio: Any) -> Any:
    """A ratio of clients; all of them for 1, which as a cohort would be one client."""
    return None if ratio == 1 else ratio


def _rate(share: Any) -> Any:
    """FedSub's adaptive rank: a share of each layer's width, or off."""
    return float(share) if share else OFF


def _configured(file: Any) -> str:
    """FedSub's file of a model's sizes, which are those of our name."""
    path = Path(str(file))
    if path.is_file():
        raise ValueError(f"model_config={file} is a file here: write model=pretrained pretrained.source={file}")
    return path.stem


def _switch(on: Any, off: Any = OFF) -> Callable[[Any], Any]:
    """The value of a published switch."""
    return lambda value: on if value is True else off if value in (False, None) else value


def _precision(value: Any) -> Any:
    return "float32" if str(value) == "None" else value


def _bf16(value: Any) -> Any:
    return "bf16" if value == "bfloat16" else value


def _norm(value: Any) -> Any:
    """The largest norm of a gradient; none for 0."""
    return value or None


# FSL-SAGE (Hydra), InCo Aggregation, NIID-Bench and what several of them share.
FEDERATED = (
    Option("cut", "cut.at"),
    Option("cut.noise", "algorithm.cut_noise", kind="lenient"),
    Option("num_clients, client_number, n_parties", "clients"),
    Option("comm_round", "rounds"),
    Option("alg, algorithm.name", "algorithm"),
    Option("sample, client_sample_ratio", "cohort", value=_share),
    Option("epochs, epochs_client, model.client.epoch", "local_epochs"),
    Option("model.client.batch_size", "batch_size"),
    Option("rho", "momentum"),
    Option("wd, reg", "weight_decay"),
    Option("agg_factor", "combine", value=_auto),
    Option("server_update_interval", "algorithm.server_update_interval", kind="lenient"),
    Option("align_interval", "algorithm.align_interval", kind="lenient"),
    Option("warm_start", "algorithm.warm_start", kind="lenient"),
    Option("model.auxiliary.align_epochs", "algorithm.align_epochs", kind="lenient"),
    Option("model.auxiliary.align_batch_size", "algorithm.align_batch_size", kind="lenient"),
    Option("model.auxiliary.max_dataset_size", "algorithm.memory_size", kind="lenient"),
    Option("model.name", "model"),
    Option("dataset.name", "dataset"),
    Option("data_dir, datadir", "dataset.folder"),
    Option("dataset.distribution, partition_method", "partition"),
    Option("beta, dataset.alpha, partition_alpha", "partition.alpha", kind="lenient"),
    Option("dataset.shard_num", "partition.shards_per_client", kind="lenient"),
    Option("rank, update_proj_gap, galore_scale, proj_type",
           "optimizer.rank, optimizer.update_proj_gap, optimizer.scale, optimizer.proj_type"),
    Option("dtype", "precision"),
    Option("rand_seed", "seed"),
    Option("checkpoint_interval", "checkpoint_every"),
    Option("save_dir_prefix", "folder"),
)  # fmt: skip

# FedSub's three programs.  They count local steps where rounds are counted here, one of which is `tau` steps.
FEDSUB = (
    Option("optimizer", "`algorithm`", "✓ `subscafsgd` is `fedsub`, `fedavgsgd` is `fedavg`; data-parallel `sgd` is "
           "`algorithm=fedavg local_steps=1`", kind="told"),
    Option("tau", "local_steps"),
    Option("comp_dim", "fedsub.rank", "also by target: `fedsub.rank='{q_proj: 64, down_proj: 0.1}'`"),
    Option("adaptive_cp_rate", "fedsub.rank", "a share of each layer's width; 0 is off; beside `comp_dim` the last one "
           "typed counts", _rate),
    Option("gene_method", "fedsub.projection", "`cd`, `rd`, `ss`, `svd`, `idx`"),
    Option("update_cp_freq", "fedsub.refresh", "in rounds: `update_cp_freq` / `tau`", kind="refused"),
    Option("change_cd", "", "`svd` stays; it is of a sketch of the dense gradients", kind="refused"),
    Option("jump_certain_modules", "fedsub.skip", "`[0,1]` leaves out layers 0 and 1; which layers at all: "
           "`fedsub.targets`"),
    Option("model_config", "model", "`configs/llama_60m.json` is `llama_60m`; a file that is here: `model=pretrained "
           "pretrained.source=FILE`", _configured),
    Option("arch", "model", "`resnet20` to `resnet1202`; their 7 x 7 kernels are `model.kernel=7`"),
    Option("num_training_steps", "rounds", "`num_training_steps` / `tau`", kind="refused"),
    Option("epoch", "rounds", "passes over all data: `epoch` * examples / (`batch_size` * `tau`). `epochs` is "
           "`local_epochs`, as in other programs", kind="refused"),
    Option("total_batch_size", "batch_size", "a client's whole batch of a step; `accumulate=total_batch_size / "
           "batch_size` cuts it into passes", kind="refused"),
    Option("max_length", "dataset.length", "of `corpus` and `wikitext2`", kind="lenient"),
    Option("lr, momentum, nesterov, weight_decay, batch_size, seed", "the same",
           "the seed acts, and all clients start from one model", kind="told"),
    Option("dampening", "optimizer.dampening"),
    Option("constant_lr", "schedule", "`constant`, else `cosine`", _switch("constant", "cosine")),
    Option("warmup", "`warmup`", "in rounds: `warmup` / `tau`; below 1 a share of them", kind="told"),
    Option("grad_clip", "clip", "0 is none; acts in per-layer mode too", _norm),
    Option("mixed_precision", "precision", "`float32` for None", _precision),
    Option("flash_attn", "model.attention", "`flash_attention_2`; the default, `sdpa`, takes torch's flash kernels on "
           "a GPU in bf16", _switch("flash_attention_2", "sdpa"), "lenient"),
    Option("ckpt", "checkpointing", "whole blocks"),
    Option("per_layer_weight_update", "per_layer", "goes with precision, accumulation and checkpointing"),
    Option("data_hete", "partition", "`class_blocks`, else `iid`", _switch("class_blocks", "iid")),
    Option("eval_freq", "evaluate_every", "in rounds: `eval_freq` / `tau`", kind="refused"),
    Option("evaluate, pretrained", "`lilliput evaluate`, `init`", "of the ResNets; `pretrained` did nothing",
           kind="told"),
    Option("measure_comm", "profile", "`comm`", _switch("comm")),
    Option("measure_all", "profile", "`all`", _switch("all")),
    Option("use_wandb, wandb_run_name", "wandb, name"),
    Option("mem_monitor, use_log, use_tqdm, print_freq", "", "memory, throughput and bytes are in every row; a live "
           "table, or `--plain`", kind="refused"),
)  # fmt: skip

# The training script of GaLore and Online Subspace Descent, for `lilliput pretrain`.
PRETRAINING = (
    Option("model_config", "`model`", "a name, or the file where it exists", kind="told"),
    Option("use_hf_model", "", "every model is Hugging Face's", kind="idle"),
    Option("continue_from", "`continue_from`, `init`, `lilliput resume`", "restores the optimizer, schedule and "
           "position too", kind="told"),
    Option("batch_size, gradient_accumulation, total_batch_size", "`batch_size`, `accumulate`", "ours is the whole "
           "batch of a step; beside one of the other two, `batch_size` is what it was", kind="told"),
    Option("max_length", "`max_length`", kind="told"),
    Option("optimizer", "`optimizer`", "all names; `…_per_layer` is `per_layer=true`", kind="told"),
    Option("lr, weight_decay, min_lr_ratio", "the same", kind="told"),
    Option("scheduler", "schedule", "`cosine`, `linear`, `cosine_restarts` with `restart_every`; `constant`"),
    Option("warmup_steps", "warmup", "steps, or a share below 1"),
    Option("num_training_steps, max_train_tokens", "steps, tokens", "a budget counts tokens, not sequences"),
    Option("activation_checkpointing", "checkpointing"),
    Option("eval_every, save_every", "the same", kind="told"),
    Option("save_dir", "`folder`, `name`", kind="told"),
    Option("dtype", "dtype", "`bfloat16` is `bf16`", _bf16),
    Option("grad_clipping", "clip", "acts in per-layer mode too", _norm),
    Option("beta1", "`optimizer.momentum` of SGD, `optimizer.beta1` of Adafactor", kind="told"),
    Option("rank, update_proj_gap, galore_scale, proj_type",
           "optimizer.rank, optimizer.update_proj_gap, optimizer.scale, optimizer.proj_type"),
    Option("tags, name", "the same", kind="told"),
    Option("seed", "`seed`", kind="told"),
    Option("workers", "", "a thread prepares batches ahead, as many as `prefetch` says", kind="idle"),
    Option("single_gpu", "", "without `torchrun` there is one process", kind="idle"),
    Option("log_details", "", "`metrics.jsonl` has all there is", kind="idle"),
)  # fmt: skip


def markdown(options: Iterable[Option], ticks: bool = False) -> str:
    """A table as the README has it; `ticks` mark the options that are read as they are typed."""
    lines = ["| published | here | |", "|---|---|---|"]
    for option in options:
        note = f"✓ {option.note}".strip() if ticks and option.kind in ("read", "lenient") else option.note
        ours = option.ours if option.kind == "told" else _code(option.ours)
        lines.append("|".join(["", *(f" {cell} ".replace("  ", " ") for cell in (_code(option.keys), ours, note)), ""]))
    return "\n".join(lines)


def _code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", ") if name)
