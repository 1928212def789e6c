"""lilliput trains one model across devices too small for it.

Importing it loads torch and nothing heavier; what a name needs is imported when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lilliput import algorithms, data, engines, lean, models, optim, splitter, tasks
    from lilliput.core.fleet import Client, Fleet, Model, Profile, Reply, on_client
    from lilliput.core.tree import Body, Tree
    from lilliput.experiment.experiment import Experiment, History
    from lilliput.experiment.stop import Stop
    from lilliput.pretraining import pretrain
    from lilliput.splitter import auxiliary, split
    from lilliput.submodel import Slice
    from lilliput.subspace import (
        SubspaceConv2d,
        SubspaceLinear,
        dense,
        outer_update,
        replace_with_subspace,
        subspace_optimizer,
    )
    from lilliput.wire import codecs

__version__ = "0.1.0"

_HOME = {
    "Experiment": "experiment.experiment", "History": "experiment.experiment", "Stop": "experiment.stop",
    "Client": "core.fleet", "Fleet": "core.fleet", "Model": "core.fleet", "Profile": "core.fleet",
    "Reply": "core.fleet", "on_client": "core.fleet",
    "Slice": "submodel", "split": "splitter", "auxiliary": "splitter", "Body": "core.tree", "Tree": "core.tree",
    "pretrain": "pretraining",
    "SubspaceConv2d": "subspace", "SubspaceLinear": "subspace", "dense": "subspace", "outer_update": "subspace",
    "replace_with_subspace": "subspace", "subspace_optimizer": "subspace",
}  # fmt: skip
_MODULES = {"codecs": "wire.codecs"} | {
    name: name for name in ("algorithms", "data", "engines", "lean", "models", "optim", "splitter", "tasks")
}

__all__ = [
    "Body", "Client", "Experiment", "Fleet", "History", "Model", "Profile", "Reply", "Slice", "Stop", "SubspaceConv2d",
    "SubspaceLinear", "Tree", "algorithms", "auxiliary", "codecs", "data", "dense", "engines", "lean", "models",
    "on_client", "optim", "outer_update", "pretrain", "replace_with_subspace", "split", "splitter",
    "subspace_optimizer", "tasks",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"lilliput.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"lilliput.{_MODULES[name]}")
    raise AttributeError(f"module 'lilliput' has no attribute {name!r}")
