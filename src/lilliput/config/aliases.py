"""The published programs' own keys and names, so that their commands run here as they are typed.

From FSL-SAGE (Hydra), InCo Aggregation, NIID-Bench and GaLore (argparse); names are in `axes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lilliput.registry import normal


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
    "checkpoint_interval": Alias("checkpoint_every"),
    "save_dir_prefix": Alias("folder"),
}

_BY_NORMAL = {".".join(map(normal, key.split("."))): alias for key, alias in ALIASES.items()}


def alias(key: str) -> Alias | None:
    """The alias of a key, whose case, `-` and `_` do not matter; None if it is none."""
    return _BY_NORMAL.get(".".join(map(normal, key.split("."))))
