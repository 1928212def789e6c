"""Memory as torch's CPU allocator reports it to torch's profiler, independently of our own meters."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lilliput.footprint import Setting


def peak(run: Callable[[], Any]) -> int:
    """The peak of bytes allocated while this runs, beyond those allocated before."""
    now = most = 0
    for change in changes(run):
        now += change
        most = max(most, now)
    return most


def changes(run: Callable[[], Any]) -> Iterator[int]:
    """The bytes of every allocation, and negative bytes of every release, in order, while this runs."""
    gc.collect()  # what others left behind is not to be released meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return (event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))


def trained(setting: Setting, model: nn.Module, steps: int = 3) -> None:
    """Build a setting's module and train it for a few steps on random examples."""
    training = setting.steps(materialised(model))
    for _ in range(steps):
        training.step(examples(setting.example(model)))


def materialised(model: nn.Module) -> nn.Module:
    """A model from the meta device with random weights, in training mode."""
    model = model.to_empty(device="cpu").train()
    for x in (*model.parameters(), *model.buffers()):
        x.data.normal_(std=0.02) if x.is_floating_point() else x.data.zero_()
    return model


def examples(batch: Any) -> Any:
    """A batch of this form with values."""
    if isinstance(batch, dict):
        return {name: examples(x) for name, x in batch.items()}
    if isinstance(batch, tuple):
        return tuple(examples(x) for x in batch)
    made = torch.rand(batch.shape).to(batch.dtype)
    return made if batch.is_floating_point() else torch.randint(2, batch.shape)
