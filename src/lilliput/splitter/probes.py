"""Two batches of different size that a cut is decided and checked on, from an example or from the model alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lilliput.core import random
from lilliput.core.layers import is_linear, sides
from lilliput.splitter.names import Signature, leaves, mapped, mapped_tensors
from lilliput.splitter.parts import core

EXAMPLES = (2, 3)  # of the two batches
LENGTHS = (7, 5)  # of their sequences, at most: no two sizes of either batch are the same
SHARED = ("attention_mask", "position_ids")  # inputs that may travel as they are, if a server needs them

Inputs = dict[str, Any]  # by the names of the model's forward


def probes(model: nn.Module, example: Any, shared: tuple[str, ...]) -> tuple[Inputs, Inputs]:
    """Two batches like the example, of 2 and 3 examples and, for sequences, of different lengths; the second padded.

    example: a tensor, a tuple of positional or a dictionary of keyword inputs; made from the model for None.
    """
    inputs = _varied(model, named(model, example), shared)
    batches = [_batch(inputs, shared, n, None) for n in EXAMPLES]
    length = max((x.shape[1] for x in leaves(inputs).values() if _sequence(x)), default=1)
    if length > 1:
        lengths = [min(length - i, most) for i, most in enumerate(LENGTHS)]
        shorter = [_batch(inputs, shared, n, most) for n, most in zip(EXAMPLES, lengths, strict=True)]
        if all(_error(model, batch) is None for batch in shorter):  # a model of one length keeps it
            batches = shorter
    for batch in batches:
        error = _error(model, batch)
        if error is not None:
            raise ValueError(f"{type(core(model)).__name__} does not run on its example: {error}") from error
    return batches[0], batches[1]


def _varied(model: nn.Module, inputs: Inputs, shared: tuple[str, ...]) -> Inputs:
    """The inputs, with random values for those that are constant: zeros would check little."""
    draw = random.generator("varied")
    words = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 2)

    def one(name: str, x: Any) -> Any:
        private = isinstance(x, Tensor) and x.device.type != "meta" and name.rpartition(".")[2] not in shared
        if not private or not x.numel() or not torch.equal(x, x.flatten()[0].expand_as(x)):
            return x
        if x.is_floating_point():
            return torch.randn(x.shape, generator=draw).to(x)
        return torch.randint(words, x.shape, generator=draw).to(x)

    return mapped(inputs, one)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output for inputs by name."""
    args, kwargs = Signature(model).unbind(inputs)
    return model(*args, **kwargs)


def _error(model: nn.Module, inputs: Inputs) -> Exception | None:
    try:
        with torch.no_grad(), random.seeded("probe"):
            call(model.train(), inputs)
    except Exception as error:
        return error
    return None


def named(model: nn.Module, example: Any) -> Inputs:
    """The inputs that an example gives, by name and where the model is; made from the model for None."""
    example = guess(model) if example is None else example
    if isinstance(example, dict):
        # Labels are the loss's, which is computed outside of the model.
        args, kwargs = (), {name: x for name, x in example.items() if name != "labels"}
    else:
        args, kwargs = tuple(example) if isinstance(example, tuple | list) else (example,), {}
    device = next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return mapped_tensors(Signature(model).bind(args, kwargs), lambda x: x.detach().to(device))


def _sequence(x: Any) -> bool:
    """Whether dimension 1 is a length: token ids, masks, series of vectors."""
    return isinstance(x, Tensor) and x.dim() == (3 if x.is_floating_point() else 2)


def _batch(inputs: Inputs, shared: tuple[str, ...], examples: int, length: int | None) -> Inputs:
    """Inputs like these for so many examples of this length; the last size's masks are padded to the right."""
    generator = random.generator("probe", examples)
    rows = next(x.shape[0] for x in leaves(inputs).values() if isinstance(x, Tensor))

    def one(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[0] != rows:
            return x
        x = x[torch.arange(examples) % rows]
        x = x[:, :length] if _sequence(x) else x
        if name.rpartition(".")[2] not in shared:
            shuffled = torch.randint(x.numel(), x.shape, generator=generator)
            return x.flatten()[shuffled.to(x.device)] if x.device.type != "meta" else x
        if "mask" in name and examples == EXAMPLES[-1] and x.dim() == 2:
            keep = x.shape[1] - torch.arange(examples)[:, None].clamp(max=x.shape[1] - 1)
            return (torch.arange(x.shape[1])[None] < keep).to(x)
        return x

    return mapped(inputs, one)


def guess(model: nn.Module) -> Any:
    """An example for a model that says what it takes: one of `transformers`, or one whose first layer tells."""
    config = getattr(core(model), "config", None)
    if config is not None and hasattr(config, "to_dict"):
        return _from_config(core(model), config)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
            length = min(8, *tables) if len(tables) > 1 else 8
            return torch.randint(module.num_embeddings, (2, length), generator=random.generator("guess"))
        if is_linear(module):
            return torch.randn(2, sides(module)[0], generator=random.generator("guess"))
        if isinstance(module, nn.Conv2d):
            for side in (32, 28, 224, 64, 96, 8):
                images = torch.randn(2, module.in_channels, side, side, generator=random.generator("guess"))
                if _error(model, named(model, images)) is None:
                    return images
    raise ValueError(f"what {type(core(model)).__name__} takes cannot be told from it; pass example=a batch of inputs")


def _from_config(model: nn.Module, config: Any) -> dict[str, Tensor]:
    kind, draw = getattr(model, "main_input_name", "input_ids"), random.generator("guess")
    if kind == "pixel_values":
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.randn(2, config.num_channels, side, side, generator=draw)}
    if kind != "input_ids":
        raise ValueError(f"what a batch of {kind} is cannot be told from the model; pass example=a batch of inputs")
    text = config.get_text_config()
    ids = torch.randint(
        text.vocab_size, (2, min(8, getattr(text, "max_position_embeddings", None) or 8)), generator=draw
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
