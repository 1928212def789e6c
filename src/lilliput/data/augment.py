"""Augmentation of a whole batch of images at once (crop, flip, cutout), and normalisation.

Images are (N, C, H, W).  Crop and flip act on the pixels as stored.  Cutout acts after normalising, so that it fills
with the mean colour (DeVries and Taylor, 2017).  All draws come from the generator; without one there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lilliput.core.registry import nearest

Draw = torch.Generator
Step = Callable[[Tensor, Draw], Tensor]


def crop(x: Tensor, generator: Draw, padding: int = 4, mode: str = "zero") -> Tensor:
    """Pad the images (`mode`: zero or reflect) and cut windows of the original size at random places."""
    n, _, height, width = x.shape
    if padding >= min(height, width):
        raise ValueError(f"crop:{padding} exceeds images of {height} x {width}; choose less than {min(height, width)}")
    padded = pad(x, padding, mode)
    views = padded.unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 2 padding + 1, 2 padding + 1, H, W), no copy
    down, right = (torch.randint(2 * padding + 1, (n,), generator=generator) for _ in range(2))
    # numpy gathers whole windows, three times as fast as torch, which goes pixel by pixel.
    return torch.from_numpy(views.numpy()[np.arange(n), :, down.numpy(), right.numpy()])


def pad(x: Tensor, padding: int, mode: str) -> Tensor:
    """Pad every side by `padding` pixels; works for every dtype."""
    if mode == "zero":
        return torch.nn.functional.pad(x, (padding,) * 4)
    if mode != "reflect":
        raise ValueError(f"crop pads by zero or reflect, not {mode!r}")
    for dim in (2, 3):
        last = x.shape[dim] - 1
        x = x.index_select(dim, last - (last - torch.arange(-padding, last + padding + 1).abs()).abs())
    return x


def flip(x: Tensor, generator: Draw) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    mirrored = (torch.rand(len(x), generator=generator) < 0.5).nonzero().flatten()
    return x.index_copy(0, mirrored, x.index_select(0, mirrored).flip(3))


def cutout(x: Tensor, generator: Draw, size: int = 16) -> Tensor:
    """Set a square of `size` pixels around a random pixel of each image to zero, clipped at the edges."""
    inside = []
    for length in x.shape[2:]:
        centre = torch.randint(length, (len(x), 1), generator=generator)
        place = torch.arange(length)
        inside.append((place >= centre - size // 2) & (place < centre - size // 2 + size))
    rows, columns = inside
    return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def normalise(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Convert images to float32 and scale uint8 to [0, 1]; then subtract each channel's mean and divide by std."""
    scale = 1.0 if x.is_floating_point() else 255.0
    x = x.to(torch.float32)
    if mean is None or std is None:
        return x / scale if scale != 1 else x
    return (x - scale * _channels(mean)).mul_(1 / (scale * _channels(std)))


STEPS: dict[str, Callable[..., Tensor]] = {"crop": crop, "flip": flip, "cutout": cutout}


@dataclass(frozen=True)
class Augment:
    """The transform of a data set's batches; steps are names with settings: `crop:4:reflect`, `flip`, `cutout:16`."""

    steps: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for text in self.steps:
            step(text)

    def __call__(self, x: Tensor, generator: Draw | None) -> Tensor:
        """Augment and normalise images; without a generator, only normalise them."""
        late = [text for text in self.steps if text.startswith("cutout")]
        if generator is not None:
            for text in self.steps:
                x = x if text in late else step(text)(x, generator)
        x = normalise(x, self.mean, self.std)
        if generator is not None:
            for text in late:
                x = step(text)(x, generator)
        return x


def step(text: str) -> Step:
    """The step for a name with its settings, such as `crop:4:reflect`; raises ValueError if it is unknown."""
    name, *settings = text.split(":")
    if name not in STEPS:
        raise ValueError(f"unknown augmentation {text!r}; {nearest(name, STEPS)}")
    if len(settings) > {"crop": 2, "flip": 0, "cutout": 1}[name]:
        raise ValueError(f"augmentation {text!r} has too many settings; write crop:4:reflect, flip, cutout:16")
    keys = {"crop": ("padding", "mode"), "flip": (), "cutout": ("size",)}[name]
    values: dict[str, int | str] = {}
    for key, value in zip(keys, settings, strict=False):
        if key != "mode" and not value.isdigit():
            raise ValueError(f"augmentation {text!r}: {key} is {value!r}; it must be a whole number of pixels")
        if key == "mode" and value not in ("zero", "reflect"):
            raise ValueError(f"augmentation {text!r}: choose zero or reflect, not {value!r}")
        values[key] = value if key == "mode" else int(value)
    return partial(STEPS[name], **values)


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]
