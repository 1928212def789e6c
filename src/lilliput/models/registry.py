"""The models that have a name, and how a name becomes a model.

A factory takes `shape` (of one example), `classes` and options of its own by keyword, and returns an `nn.Module`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from lilliput.core.registry import described, nearest, resolve
from lilliput.models.char_lm import CharLM
from lilliput.models.char_lstm import CharLSTM
from lilliput.models.cnn import CNN, PflCNN, SimpleConv
from lilliput.models.mlp import MLP
from lilliput.models.resnet import BottleneckResNet, CifarResNet, ResNet
from lilliput.models.transformers import NAMES, for_data, from_source, summary

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "cnn": CNN,
    "cnn_pfl": PflCNN,
    "simple_conv": SimpleConv,
    **{
        f"resnet{layers}": described(
            f"CIFAR ResNet of {layers} layers and at most 64 channels (He et al., 2016); for images of 32 pixels",
            CifarResNet,
            ((layers - 2) // 6,) * 3,
        )
        for layers in (20, 32, 44, 56, 110, 1202)
    },
    **{
        f"resnet{2 * sum(blocks) + 2}": described(
            f"ResNet of {2 * sum(blocks) + 2} layers and up to 512 channels, {tier}", ResNet, blocks
        )
        for blocks, tier in {
            (1, 1, 1, 1): "InCo's smallest tier",
            (1, 1, 2, 2): "InCo's second tier",
            (2, 2, 2, 2): "as torchvision has it; InCo's third tier",
            (2, 2, 3, 3): "InCo's fourth tier",
            (3, 3, 3, 3): "InCo's largest tier",
        }.items()
    },
    "resnet50": described(
        "ResNet of 50 layers with bottleneck blocks, as torchvision has it; for larger images",
        BottleneckResNet,
        (3, 4, 6, 3),
    ),
    "char_lm": CharLM,
    "char_lstm": CharLSTM,
    **{name: described(summary(name), for_data, name) for name in NAMES},
    "pretrained": from_source,
}


def names() -> list[str]:
    """The names that `build` knows, in alphabetical order."""
    return sorted(MODELS)


def build(name: str, *, shape: Sequence[int], classes: int, **options: Any) -> nn.Module:
    """The model of this name for examples of `shape` and logits over `classes`, freshly initialised.

    `name` is one of `names()`, a file and a name in it (`mine.py:Net`), an import path (`package.module:Net`) or an
    entry point of the group `lilliput.models`.  A model of a user's own may be a class or a function, which is given
    those of `shape`, `classes` and `options` that its signature asks for, or a module, which is copied.

    Weights come from torch's global generator: `torch.manual_seed(s)` before the call fixes them.
    Raises ValueError for an unknown name or option and for a shape that the model cannot take.
    """
    made = resolve("model", name, MODELS)
    if isinstance(made, nn.Module):
        factory: Callable[..., Any] = partial(copy.deepcopy, made)
    elif callable(made):
        factory = made
    else:
        raise ValueError(f"model {name!r} is of type {type(made).__name__}; name a class, a function or a module")
    model = factory(**_arguments(name, factory, {"shape": tuple(shape), "classes": classes}, options))
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} made something of type {type(model).__name__}; it must make an nn.Module")
    return model


def _arguments(
    name: str, factory: Callable[..., Any], about: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """All options, and what `factory` asks for of the facts `about` the data."""
    if isinstance(factory, partial) and factory.func is copy.deepcopy:
        accepted: list[str] = []
    else:
        parameters = inspect.signature(factory).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return {**about, **options}
        accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in options:
        if option not in accepted:
            own = [known for known in accepted if known not in about]
            raise ValueError(f"model {name!r} has no option {option!r}; {nearest(option, own)}")
    return {**{key: value for key, value in about.items() if key in accepted}, **options}
