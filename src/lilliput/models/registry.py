"""The models by name, and how a name becomes a model.

A factory takes `shape` (of one example), `classes` and its own options by keyword, and returns an `nn.Module`.
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
            f"A ResNet of {layers} layers, 16 to 64 channels, for 32x32 images (He et al., 2016); {size} parameters",
            CifarResNet,
            ((layers - 2) // 6,) * 3,
        )
        for layers, size in {20: "270k", 32: "464k", 44: "659k", 56: "853k", 110: "1.7M", 1202: "19.4M"}.items()
    },
    **{
        f"resnet{2 * sum(blocks) + 2}": described(
            f"A ResNet of {2 * sum(blocks) + 2} layers, 64 to 512 channels{use}", ResNet, blocks
        )
        for blocks, use in {
            (1, 1, 1, 1): ", the smallest tier of InCo; 4.9M parameters",
            (1, 1, 2, 2): ", the second tier of InCo; 10.8M parameters",
            (2, 2, 2, 2): ": torchvision's, and the third tier of InCo; 11.2M parameters",
            (2, 2, 3, 3): ", the fourth tier of InCo; 17.1M parameters",
            (3, 3, 3, 3): ", the largest tier of InCo; 17.5M parameters",
        }.items()
    },
    "resnet50": described(
        "torchvision's ResNet of 50 layers with bottleneck blocks, for larger images; 23.5M parameters",
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
    entry point of the group `lilliput.models`.  Your own model may be a class or a function, which receives `shape`,
    `classes` and `options` as far as its signature names them, or a module, which is copied.

    Weights come from torch's global generator: `torch.manual_seed(s)` before the call fixes them.
    Raises ValueError if the name or an option is unknown, or the model cannot take the shape.
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
    """All options, and those facts `about` the data that `factory` takes."""
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
