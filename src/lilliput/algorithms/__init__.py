"""Federated methods, one file each; the names that a command line knows."""

from lilliput.algorithms.baselines import Centralized, LocalOnly
from lilliput.algorithms.fedavg import FedAvg
from lilliput.algorithms.fednova import FedNova
from lilliput.algorithms.fedprox import FedProx
from lilliput.algorithms.moon import Moon
from lilliput.algorithms.scaffold import Scaffold

ALGORITHMS: dict[str, type] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "moon": Moon,
    "centralized": Centralized,
    "local_only": LocalOnly,
}

__all__ = ["ALGORITHMS", "Centralized", "FedAvg", "FedNova", "FedProx", "LocalOnly", "Moon", "Scaffold"]
