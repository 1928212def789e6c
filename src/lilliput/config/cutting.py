"""Where split methods cut the model: the nodes `cut` and `auxiliary`, and the published cuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lilliput.config.fields import fields_of

if TYPE_CHECKING:
    from torch import nn

    from lilliput.config.settings import Settings
    from lilliput.data import Federated

# The module that the server's part begins with.  ResNets and simple_conv as in FSL-SAGE's published program, the other
# networks of ours about in the middle; a model that is not here is cut in the middle of its blocks.
CUTS = {
    "mlp": "hidden.1", "cnn": "fc1", "cnn_pfl": "fc1", "simple_conv": "fc1", "char_lstm": "lstm",
    **dict.fromkeys(("resnet10", "resnet14", "resnet18", "resnet22", "resnet26", "resnet50"), "layer3"),
    **dict.fromkeys(("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet1202"), "layer2"),
}  # fmt: skip


WAYS = ("at", "memory", "bytes_per_round")


@dataclass(frozen=True)
class Cut:
    """Where split methods cut the model; `cut=layer3` is short for `cut.at=layer3`."""

    at: str | int | list[str] | None = None  # the module that the server begins with, or blocks on the device
    memory: str | None = None  # instead: the latest cut whose device part trains in so much memory, such as 200MB
    bytes_per_round: str | None = None  # instead: the cut whose round sends at most so much, such as 50MB
    tied: Literal["untie", "frozen", "sync"] = "untie"  # what becomes of weights that both parts use


@dataclass(frozen=True)
class Auxiliary:
    """The head that stands in for the server's part on the device, for CSE-FSL and FSL-SAGE."""

    depth: int = 1  # how many of the server's stages or blocks it has
    weights: Literal["fresh", "server"] = "fresh"  # what it starts from: new ones, as published, or the server's
    head: Literal["full", "low_rank", "frozen"] = "full"  # its last layer; frozen: the server's own, which stays
    rank: int = 64  # of a low_rank head


def is_split(method: Any) -> bool:
    """Whether a method wants a task whose model is cut."""
    return bool(getattr(method, "split", False))


def has_head(method: Any) -> bool:
    """Whether a split method wants an auxiliary head."""
    return is_split(method) and "auxiliary" in fields_of(method if isinstance(method, type) else type(method))


def uses(node: str, method: Any) -> bool:
    """Whether a method has a use for the node `cut` or `auxiliary`."""
    return has_head(method) if node == "auxiliary" else is_split(method)


def default(model: str, given: Mapping[str, Any]) -> str | None:
    """The published cut of a model, unless another way to cut is given; None where there is none."""
    return None if any(given.get(way) is not None for way in WAYS) else CUTS.get(model)


def options(s: Settings, method: Any, model: nn.Module, federated: Federated) -> dict[str, Any]:
    """What `Split.of` is told beside the model: where to cut, an example, and the auxiliary head."""
    import torch

    with torch.device("cpu"):  # the model may be made without values
        batch = next(iter(federated.train[min(federated.train)].epoch(None)))
    inputs = {k: x for k, x in batch.items() if k != "labels"} if isinstance(batch, dict) else batch[0]
    given, head = s.nodes["cut"], s.nodes["auxiliary"] if has_head(method) else None
    place = _place(given, s["batch_size"], method, model, inputs, max(map(len, federated.partition.values())))
    return {"at": place, "tied": given["tied"], "example": inputs, "auxiliary": head}


def _place(given: Mapping[str, Any], batch_size: int, method: Any, model: nn.Module, inputs: Any, examples: int) -> Any:
    """Where to cut, as the splitter takes it; `examples` are those of the largest client."""
    from lilliput import splitter

    ways = {way: given[way] for way in WAYS if given[way] is not None}
    if len(ways) > 1:
        raise ValueError(f"cut.{' and cut.'.join(ways)} are several ways to cut; choose one")
    if "memory" in ways:
        return splitter.memory(ways["memory"], batch_size, method)
    if "bytes_per_round" in ways:
        seen = method.local_epochs * examples if method.local_steps is None else method.local_steps * batch_size
        every = getattr(method, "server_update_interval", 0)
        return splitter.bytes_per_round(ways["bytes_per_round"], seen, every or 1, gradients=not every)
    at = ways.get("at")
    return splitter.middle(model, inputs) if at is None else tuple(at) if isinstance(at, list) else at
