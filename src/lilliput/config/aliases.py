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


def _share(ratio: Any) -> Any:
    """A ratio of clients; all of them for 1, which as a cohort would be one client."""
    return None if ratio == 1 else ratio


ALIASES: dict[str, Alias] = {
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
