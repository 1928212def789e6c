"""The settings of `lilliput pretrain`, a recipe's row below them, and what came of the rows that were run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lilliput.cli import folder as folders
from lilliput.cli.run_words import tell
from lilliput.config.aliases import pretraining
from lilliput.config.single import read
from lilliput.core.registry import nearest
from lilliput.pretraining import Pretrain
from lilliput.recipes import find

# Settings that change how a run is taken or kept, not what it computes.
FREE = frozenset({
    "accumulate", "checkpointing", "continue_from", "device", "eval_every", "folder", "lean", "log_every", "memory",
    "name", "parallel", "per_layer", "prefetch", "program", "save_every", "tags", "tensorboard", "wandb",
})  # fmt: skip


def settings(layers: Sequence[Mapping[str, Any]]) -> Pretrain:
    """The settings that layers give, a recipe below all of them.  Raises ValueError for what does not go together."""
    typed: dict[str, Any] = {}
    for layer in layers:
        translated, remarks = pretraining(layer)
        typed = {**typed, **translated}
        tell(remarks)
    typed.pop("program", None)
    name, case = typed.pop("recipe", None), typed.pop("case", None)
    below = _row(str(name), case) if name is not None else {}
    for one, other in (("steps", "tokens"), ("tokens", "steps")):  # one typed replaces the other of a recipe
        if typed.get(one) is not None:
            below.pop(other, None)
    return read(Pretrain, below, typed, command="pretrain")


def _row(name: str, case: Any) -> dict[str, Any]:
    """The settings of one row of a recipe's table.  Raises ValueError with the rows that there are."""
    recipe = find(name, "pretrain")
    rows = recipe.layers("full")
    if case is None:
        raise ValueError(f"recipe {recipe.name} has several rows; choose one with case=: {', '.join(rows)}")
    if case not in rows:
        raise ValueError(f"recipe {recipe.name} has no case {case!r}; {nearest(str(case), rows)}")
    return dict(rows[str(case)])


def check(name: str, layers: Sequence[Mapping[str, Any]]) -> int:
    """Hold the finished runs of a recipe against what was published; nothing is trained.  0 unless not reproduced.

    layers: the settings of the run, but for the case.
    """
    recipe = find(name, "pretrain")
    version = recipe.version("full")
    measured: dict[str, float | None] = {}
    for case in version.cases:
        value = measured[case.name] = _measured(settings([*layers, {"case": case.name}]), recipe)
        published = "" if case.published is None else f", published {case.published:g}"
        got = "not run" if value is None else f"{value:.2f}"
        print(f"{case.name}: {recipe.metric} {got}, expected {version.expectation(case)}{published}")
    verdict = version.verdict(measured)
    print(f"{recipe.name}: {verdict}")
    return 1 if verdict == "not reproduced" else 0


def _measured(c: Pretrain, recipe: Any) -> float | None:
    """What the last finished run of these settings gave; None if there is none."""
    from lilliput.report.runs import read

    same = [path for path in folders.runs(Path(c.folder)) if _same(c, path)]
    done = [path for path in same if folders.facts_of(path).get("finished")]
    latest = max(done, key=lambda path: str(folders.facts_of(path)["finished"]), default=None)
    return None if latest is None else recipe.value(read(latest).rows)


def _same(c: Pretrain, path: Path) -> bool:
    layer = folders.layer_of(path)
    return layer.get("program") == "pretrain" and _bound(settings([layer])) == _bound(c)


def _bound(c: Pretrain) -> Mapping[str, Any]:
    return {name: value for name, value in c.as_dict().items() if name not in FREE}
