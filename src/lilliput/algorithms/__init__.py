"""Federated methods, one file each, by the names of the command line."""

from lilliput.algorithms.baselines import Centralized, LocalOnly
from lilliput.algorithms.cse_fsl import CseFsl
from lilliput.algorithms.fedavg import FedAvg
from lilliput.algorithms.fednova import FedNova
from lilliput.algorithms.fedprox import FedProx
from lilliput.algorithms.fedsub import FedSub
from lilliput.algorithms.fsl_sage import FslSage
from lilliput.algorithms.moon import Moon
from lilliput.algorithms.scaffold import Scaffold
from lilliput.algorithms.splitfed_v1 import SplitFedV1
from lilliput.algorithms.splitfed_v2 import SplitFedV2

# These need a task with a cut model (`splitter.Split`).
SPLIT: dict[str, type] = {
    "splitfed_v1": SplitFedV1,
    "splitfed_v2": SplitFedV2,
    "cse_fsl": CseFsl,
    "fsl_sage": FslSage,
}

ALGORITHMS: dict[str, type] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "moon": Moon,
    "fedsub": FedSub,
    **SPLIT,
    "centralized": Centralized,
    "local_only": LocalOnly,
}

__all__ = [
    "ALGORITHMS", "SPLIT", "Centralized", "CseFsl", "FedAvg", "FedNova", "FedProx", "FedSub", "FslSage", "LocalOnly",
    "Moon", "Scaffold", "SplitFedV1", "SplitFedV2",
]  # fmt: skip
