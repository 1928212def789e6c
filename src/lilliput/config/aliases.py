"""The published programs' own keys and names, so that their commands run here as they are typed.

From FSL-SAGE (Hydra), InCo Aggregation, NIID-Bench, GaLore and FedSub (argparse); names are in `axes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lilliput.core.registry import normal

OFF = object()  # in place of a value: as if the key had not been typed


class Alias(NamedTuple):
    """The setting that a published key stands for.  `lenient`: the published program ignores it where it has no use."""

    key: str
    value: Callable[[Any], Any] = lambda value: value
    lenient: bool = False


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


def _other(remedy: str) -> Callable[[Any], Any]:
    """Of a key that has no counterpart by itself."""

    def refuse(value: Any) -> Any:
        raise ValueError(remedy)

    return refuse


# FedSub's programs count local steps where rounds are counted here, one of which is `tau` steps.
_STEPS = {
    "update_cp_freq": "update_cp_freq counts local steps: write fedsub.refresh=, which is update_cp_freq / tau rounds",
    "num_training_steps": "num_training_steps counts local steps: write rounds=, which is num_training_steps / tau",
    "eval_freq": "eval_freq counts local steps: write evaluate_every=, which is eval_freq / tau rounds",
    "epoch": "epoch counts passes over all data: write rounds=, which is epoch * examples / (batch_size * tau)",
    "total_batch_size": (
        "total_batch_size is what a step takes: write it as batch_size=, and accumulate=total_batch_size / batch_size"
    ),
    "change_cd": "change_cd turns svd into cd after so many steps; here svd stays: leave it out",
    "use_tqdm": "use_tqdm: a live table is shown anyway (--plain for lines); leave it out",
    "use_log": "use_log: metrics.jsonl and ledger.jsonl are written anyway; leave it out",
    "mem_monitor": "mem_monitor: every round's row has the peak memory; leave it out",
    "print_freq": "print_freq: there is a row per round; leave it out",
}

ALIASES: dict[str, Alias] = {
    "cut": Alias("cut.at"),
    "cut.noise": Alias("algorithm.cut_noise", lenient=True),
    "num_clients": Alias("clients"),
    "client_number": Alias("clients"),
    "n_parties": Alias("clients"),
    "comm_round": Alias("rounds"),
    "alg": Alias("algorithm"),
    "sample": Alias("cohort", _share),
    "epochs": Alias("local_epochs"),
    "rho": Alias("momentum"),
    "beta": Alias("partition.alpha", lenient=True),
    "client_sample_ratio": Alias("cohort", _share),
    "epochs_client": Alias("local_epochs"),
    "model.client.epoch": Alias("local_epochs"),
    "model.client.batch_size": Alias("batch_size"),
    "agg_factor": Alias("combine", _auto),
    "server_update_interval": Alias("algorithm.server_update_interval", lenient=True),
    "align_interval": Alias("algorithm.align_interval", lenient=True),
    "warm_start": Alias("algorithm.warm_start", lenient=True),
    "model.auxiliary.align_epochs": Alias("algorithm.align_epochs", lenient=True),
    "model.auxiliary.align_batch_size": Alias("algorithm.align_batch_size", lenient=True),
    "model.auxiliary.max_dataset_size": Alias("algorithm.memory_size", lenient=True),
    "dataset.shard_num": Alias("partition.shards_per_client", lenient=True),
    "proj_type": Alias("optimizer.proj_type"),
    "update_proj_gap": Alias("optimizer.update_proj_gap"),
    "galore_scale": Alias("optimizer.scale"),
    "rank": Alias("optimizer.rank"),
    "wd": Alias("weight_decay"),
    "reg": Alias("weight_decay"),
    "dtype": Alias("precision"),
    "rand_seed": Alias("seed"),
    "algorithm.name": Alias("algorithm"),
    "model.name": Alias("model"),
    "dataset.name": Alias("dataset"),
    "data_dir": Alias("dataset.folder"),
    "datadir": Alias("dataset.folder"),
    "dataset.distribution": Alias("partition"),
    "partition_method": Alias("partition"),
    "dataset.alpha": Alias("partition.alpha", lenient=True),
    "partition_alpha": Alias("partition.alpha", lenient=True),
    "comp_dim": Alias("fedsub.rank"),
    "adaptive_cp_rate": Alias("fedsub.rank", _rate),
    "gene_method": Alias("fedsub.projection"),
    "jump_certain_modules": Alias("fedsub.skip"),
    "tau": Alias("local_steps"),
    "max_length": Alias("dataset.length", lenient=True),
    "model_config": Alias("model", _configured),
    "arch": Alias("model"),
    "data_hete": Alias("partition", _switch("class_blocks", "iid")),
    "mixed_precision": Alias("precision", lambda value: "float32" if str(value) == "None" else value),
    "ckpt": Alias("checkpointing"),
    "flash_attn": Alias("model.attention", _switch("flash_attention_2", "sdpa"), lenient=True),
    "constant_lr": Alias("schedule", _switch("constant", "cosine")),
    "dampening": Alias("optimizer.dampening"),
    "grad_clip": Alias("clip", lambda value: value or None),
    "per_layer_weight_update": Alias("per_layer"),
    "measure_comm": Alias("profile", _switch("comm")),
    "measure_all": Alias("profile", _switch("all")),
    "use_wandb": Alias("wandb"),
    "wandb_run_name": Alias("name"),
    **{key: Alias(key, _other(remedy)) for key, remedy in _STEPS.items()},
    "checkpoint_interval": Alias("checkpoint_every"),
    "save_dir_prefix": Alias("folder"),
}

_BY_NORMAL = {".".join(map(normal, key.split("."))): alias for key, alias in ALIASES.items()}


# FedSub's names of whole methods, under the key of an optimizer.
_METHODS = {"subscafsgd": "fedsub", "fedavgsgd": "fedavg"}


def meant(key: str, value: Any) -> list[tuple[str, Any]]:
    """A setting in our words, several or none; a key's case, `-` and `_` do not matter.

    A key that ends in `?` is one that the published program ignores where it has no use.
    Raises ValueError for a published key that has no counterpart, with what to write instead.
    """
    if normal(key) == "optimizer" and normal(str(value)) in _METHODS:
        return [("algorithm", _METHODS[normal(str(value))]), ("optimizer", "sgd")]
    alias = _BY_NORMAL.get(".".join(map(normal, key.split("."))))
    if alias is None:
        return [(key, value)]
    ours = alias.value(value)
    return [] if ours is OFF else [(alias.key + ("?" if alias.lenient else ""), ours)]
