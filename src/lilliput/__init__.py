"""lilliput trains one model across devices too small for it.

Importing it loads torch and nothing heavier; what a name needs is imported when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lilliput import algorithms, codecs, data, engines, lean, models, optim, splitter, tasks
    from lilliput.experiment import Experiment, History
    from lilliput.fleet import Client, Fleet, Model, Profile, Reply, on_client
    from lilliput.pretraining import pretrain
    from lilliput.splitter import auxiliary, split
    from lilliput.stop import Stop
    from lilliput.submodel import Slice
    from lilliput.subspace import (
        SubspaceConv2d,
        SubspaceLinear,
        dense,
        outer_update,
        replace_with_subspace,
        subspace_optimizer,
    )
    from lilliput.tree import Body, Tree

__version__ = "0.1.0"

_HOME = {
    "Experiment": "experiment", "History": "experiment", "Stop": "stop",
    "Client": "fleet", "Fleet": "fleet", "Model": "fleet", "Profile": "fleet", "Reply": "fleet", "on_client": "fleet",
    "Slice": "submodel", "split": "splitter", "auxiliary": "splitter", "Body": "tree", "Tree": "tree",
    "pretrain": "pretraining",
    "SubspaceConv2d": "subspace", "SubspaceLinear": "subspace", "dense": "subspace", "outer_update": "subspace",
    "replace_with_subspace": "subspace", "subspace_optimizer": "subspace",
}  # fmt: skip
_MODULES = {"algorithms", "codecs", "data", "engines", "lean", "models", "optim", "splitter", "tasks"}

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
        return import_module(f"lilliput.{name}")
    raise AttributeError(f"module 'lilliput' has no attribute {name!r}")
