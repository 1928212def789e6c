"""Whether training fits into a memory, and which options would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lilliput.footprint.result import Footprint
from lilliput.footprint.setting import Setting
from lilliput.footprint.sizes import show
from lilliput.optim.factory import projects

Changes = dict[str, Any]
Measure = Callable[[Setting], Footprint]
EIGHT_BITS = {
    "adamw": "adamw8bit", "galore_adamw": "galore_adamw8bit", "online_subspace_adamw": "online_subspace_adamw8bit"
}  # fmt: skip


def sentence(setting: Setting, footprint: Footprint, memory: int, measure: Measure) -> str:
    """How much is needed, how much there is, and what to change if that is too little."""
    spare = memory - footprint.peak
    facts = f"{_name(setting)} needs {show(footprint.peak)} and there are {show(memory)}"
    if spare >= 0:
        return f"{facts}: it fits, with {show(spare)} to spare"
    return f"{facts}, {show(-spare)} too few; {_remedy(setting, memory, measure)}"


def _remedy(setting: Setting, memory: int, measure: Measure) -> str:
    def fits(*changes: Changes) -> int | None:
        """The peak with these changes; None if it does not fit, or cannot be trained."""
        try:
            peak = measure(_changed(setting, changes)).peak
        except Exception:  # a setting without an estimate is no remedy
            return None
        return peak if peak <= memory else None

    each = list(remedies(setting))
    single = [f"{words(changes)} ({show(peak)})" for changes in each if (peak := fits(changes)) is not None]
    if single:
        return f"{' or '.join(single[:3])} would make it fit"
    chosen: list[Changes] = []
    for changes in each:
        if chosen and "accumulate" in changes and "batch_size" not in changes:
            continue  # all accumulated gradients are kept, which undoes updates in the backward pass
        chosen.append(changes)
        if fits(*chosen) is not None:
            break
    else:
        return "none of the options makes it fit: take a smaller model, or a device with more memory"
    for changes in chosen[:-1]:  # leave out what is not needed
        fewer = [other for other in chosen if other is not changes]
        chosen = fewer if fits(*fewer) is not None else chosen
    return f"{' '.join(map(words, chosen))} ({show(measure(_changed(setting, chosen)).peak)}) would make it fit"


def _changed(setting: Setting, changes: Sequence[Changes]) -> Setting:
    return replace(setting, **{key: value for one in changes for key, value in one.items()})


def remedies(setting: Setting) -> Iterator[Changes]:
    """Changes that save memory; those that do not affect results come first."""
    s = setting
    named = isinstance(s.optimizer, str)
    if not s.per_layer and s.optimizer not in ("sgd", "adam") and s.accumulate == 1:
        yield {"per_layer": True}
    if not s.checkpointing:
        yield {"checkpointing": True}
    if not s.lean:
        yield {"lean": True}
    if s.batch_size > s.accumulate and not s.per_layer:
        yield {"accumulate": s.batch_size}
    if named and s.optimizer in EIGHT_BITS:
        yield {"optimizer": EIGHT_BITS[s.optimizer]}
    if s.dtype == "float32":
        yield {"dtype": "bf16", "precision": "float32"}
    if named and projects(s.optimizer) and (rank := s.optimizer_options.get("rank", 128)) > 1:
        yield {"optimizer_options": {**s.optimizer_options, "rank": max(1, rank // 4)}}
    if s.batch_size > 1:
        yield {"batch_size": 1, "accumulate": 1}
    if s.optimizer in ("adam", "adamw", "adamw8bit"):
        yield {"optimizer": "galore_adamw8bit", "optimizer_options": {}}


def words(changes: Changes) -> str:
    """Changes as a user types them."""
    typed = {k: v for k, v in changes.items() if k not in ("optimizer_options", "precision")}
    if "batch_size" in typed:
        typed.pop("accumulate", None)
    typed |= {f"optimizer.{k}": v for k, v in changes.get("optimizer_options", {}).items() if k == "rank"}
    return " ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in typed.items())


def _name(setting: Setting) -> str:
    model = setting.model if isinstance(setting.model, str) else type(setting.model).__name__
    optimizer = setting.optimizer if isinstance(setting.optimizer, str) else "its optimizer"
    return f"{model} with {optimizer}"
