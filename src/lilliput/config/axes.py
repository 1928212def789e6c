"""What can be chosen by name: the axes of a run, each with its names, the names' nodes, and names from elsewhere.

An axis is a top-level setting whose value is a name (`algorithm=fedprox`).  Every name has a node of its own that is
always there (`fedprox.mu=0.1`), whichever name is chosen: sweeps over names can set what only some of them know.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lilliput.config.cutting import Auxiliary, Cut
from lilliput.config.fields import Field, fields_of
from lilliput.core.fleet import Profile
from lilliput.core.registry import group, is_path, normal, resolve, spelled
from lilliput.models import lora

Target = Callable[..., Any]


class Choice(NamedTuple):
    """A name of an axis and what it stands for: a class or function whose fields are the name's node."""

    name: str
    target: Target


@dataclass(frozen=True)
class Axis:
    """One axis.  `table` gives its names, `given` are the fields that the run fills in itself."""

    key: str
    plural: str
    doc: str
    table: Callable[[], Mapping[str, Target]]
    given: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    planned: Mapping[str, str] = field(default_factory=dict)

    def names(self) -> Mapping[str, Target]:
        """Our own names, in the order they are listed."""
        return self.table()

    def choose(self, text: str) -> Choice:
        """What a user's word stands for: a name, an alias, a file, an import path or an entry point.

        Raises ValueError with the nearest name, or saying that the name is to come.
        """
        word, table = self.aliases.get(normal(text), text), self.names()
        if (name := spelled(word, table)) is not None:
            return Choice(name, table[name])
        if normal(word) in self.planned and spelled(word, self.foreign()) is None:
            planned = self.planned[normal(word)]
            raise ValueError(f"{self.key}={text}: {planned} is not in this version yet; there is {', '.join(table)}")
        target = resolve(self.key, text, table)
        return Choice(node_name(target) if is_path(text) else str(spelled(text, self.foreign())), target)

    def foreign(self) -> Mapping[str, Target]:
        """Names that installed packages add by entry points of this axis's group."""
        return _foreign().get(group(self.key), {})

    def fields(self, target: Target) -> dict[str, Field]:
        """The node of a name: the fields that a user may set."""
        return {name: f for name, f in fields_of(target).items() if name not in self.given and not name.startswith("_")}

    def nodes(self, foreign: bool = True) -> Iterator[Choice]:
        """Every name that has a node without being chosen; without the foreign ones nothing needs to be looked up."""
        for name, target in {**(self.foreign() if foreign else {}), **self.names()}.items():
            yield Choice(name, target)


@functools.lru_cache(maxsize=1)
def _foreign() -> Mapping[str, Mapping[str, Target]]:
    """All entry points of our groups, loaded: group -> name -> object.  Reading every package's metadata takes time."""
    from importlib.metadata import entry_points

    points = entry_points()
    ours = [name for name in points.groups if name.startswith("lilliput.")]
    return {name: {point.name: point.load() for point in points.select(group=name)} for name in ours}


def node_name(target: Any) -> str:
    """The node of an object of the user's own: `MyMethod` is set by `my_method.field=...`."""
    name = getattr(target, "__name__", type(target).__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


_PLANNED = {
    "heteroavg": "a preset of this name (write slice=stage)", "heterofl": "HeteroFL", "fedrolex": "FedRolex",
    "scalefl": "ScaleFL", "raffm": "RaFFM", "ray": "the Ray engine",
    "flower": "the Flower engine", "topk": "the top-k codec",
}  # fmt: skip
_PARTITIONS = {
    "homo": "iid", "hetero": "dirichlet", "noniiddirichlet": "dirichlet_equal", "noniidlabeldir": "dirichlet",
    "iiddiffquantity": "quantity", "real": "natural",
}  # fmt: skip
_PUBLISHED = {"slmultiserver": "splitfed_v1", "slsingleserver": "splitfed_v2"}


def _in(module: str, name: str) -> Callable[[], Mapping[str, Target]]:
    """A table that is imported when it is asked for."""
    return lambda: getattr(importlib.import_module(f"lilliput.{module}"), name)


def _losses() -> Mapping[str, Target]:
    from lilliput.tasks import cross_entropy

    return {"cross_entropy": cross_entropy}


def _optimizers() -> Mapping[str, Target]:
    from lilliput.training.updates import OPTIMIZERS

    return OPTIMIZERS


_PARTS = frozenset({"slice", "combine"})
_RATES = frozenset({"lr", "momentum", "weight_decay", "nesterov", "decoupled"})  # settings of the method

AXES: dict[str, Axis] = {
    axis.key: axis
    for axis in (
        Axis("algorithm", "algorithms", "the federated method", _in("algorithms", "ALGORITHMS"), _PARTS | {"control"},
             _PUBLISHED, _PLANNED),
        Axis("slice", "slices", "which part of the model a client holds", _in("submodel", "SLICES"), planned=_PLANNED),
        Axis("combine", "combines", "how clients' changes become one", _in("submodel", "COMBINES"), planned=_PLANNED),
        Axis("codec", "codecs", "how messages are made smaller", _in("wire.codecs", "CODECS"), planned=_PLANNED),
        Axis("model", "models", "the network", _in("models", "MODELS"), frozenset({"shape", "classes"})),
        Axis("dataset", "data sets", "the data set", _in("data", "DATASETS"), aliases={"wikitext": "wikitext2"}),
        Axis("partition", "partitions", "how the data lies on clients", _in("data", "PARTITIONS"), aliases=_PARTITIONS),
        Axis("loss", "losses", "what training minimises", _losses),
        Axis("optimizer", "optimizers", "what turns a client's gradients into steps", _optimizers, _RATES),
        Axis("engine", "engines", "where the clients run", _in("engines", "ENGINES"), frozenset({"device"}),
             planned=_PLANNED),
    )
}  # fmt: skip

# What each device has, in fleets whose devices are all alike.
PROFILE = "device_profile"
# Adapters beside the model's weights, whatever the model.
LORA = "lora"
# Nodes without an axis, which are there whatever is chosen.
LOOSE: dict[str, Target] = {PROFILE: Profile, LORA: lora, "cut": Cut, "auxiliary": Auxiliary}
OPTIONAL = frozenset({PROFILE, LORA})  # those that mean nothing until something in them is set
