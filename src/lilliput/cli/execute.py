"""Settings become a run in a folder: a new one, one that goes on, or one that is found finished."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lilliput.cli import folder as folders
from lilliput.cli.machine import environment
from lilliput.cli.run_words import tell
from lilliput.config import Settings, changed, flat
from lilliput.config.axes import AXES
from lilliput.config.build import Built, build
from lilliput.config.checks import check, installed
from lilliput.config.shared import LATER
from lilliput.config.values import show
from lilliput.experiment.stop import headline


@dataclass(frozen=True)
class Outcome:
    """What became of one run.  As a number, for sweepers that optimise, it is the last value of its headline metric."""

    folder: Path
    how: Literal["ran", "resumed", "found", "twice", "failed"]
    rows: Sequence[dict[str, Any]] = ()
    error: str = ""
    status: int = 0
    what: str = ""
    seconds: float = 0.0
    case: str | None = None

    def __float__(self) -> float:
        found = last(self.rows)
        if found is None:
            raise ValueError(f"{self.folder} evaluated no metric")
        return found[1]


def last(rows: Sequence[dict[str, Any]]) -> tuple[str, float] | None:
    """The metric that says how good the model is, and its last value; None if nothing was evaluated."""
    metric = headline(rows)
    return (metric[0], float([row for row in rows if metric[0] in row][-1][metric[0]])) if metric else None


def start(s: Settings, plain: bool = False, quiet: bool = False, plots: bool = True) -> Outcome:
    """Run in a new folder."""
    check(s)
    if s["engine"] == "dry":
        raise ValueError("engine=dry trains nothing, so there is no run to keep; `lilliput run --dry` tells its cost")
    folders.refuse_taken(s)
    built = build(s)
    tell(built.remarks)
    made = folders.make(built.settings)
    path = made.path
    noting = folders.Noting(path, built.settings, lambda run: _facts(s, built))
    try:
        with folders.held(path):
            return _run(built, path, "ran", noting, plain, quiet, plots)
    except BaseException as error:
        if made.undo():
            error.lilliput_folder = None  # type: ignore[attr-defined]
        raise


def go_on(
    path: Path, changes: Mapping[str, Any] | None = None, plain: bool = False, quiet: bool = False, plots: bool = True
) -> Outcome:
    """Continue the run in a folder where it stopped, with some settings changed.

    Raises ValueError for a change that would make it another run, and if the data are not those that it began with.
    """
    s, facts = going_on(path, changes), folders.facts_of(path)
    built = build(s)
    for what, now in _data(built).items():
        if facts.get(what, now) != now:
            raise ValueError(f"the {what} of {path} is not what it was; restore it, or start anew with `lilliput run`")
    # A run killed at once had not noted its facts.
    new = (lambda run: {**_facts(s, built), "finished": None}) if changes or not facts else None
    noting = folders.Noting(path, built.settings if changes else None, new)
    with folders.held(path):
        return _run(built, path, "resumed", noting, plain, quiet, plots)


def going_on(path: Path, changes: Mapping[str, Any] | None = None) -> Settings:
    """The settings of the run in a folder with some changed.  Raises ValueError for what would make it another run."""
    before = folders.read_config(path)
    s = changed(before, changes) if changes else before
    check(s)
    then, now = flat(before.as_dict()), flat(s.as_dict())
    engines = tuple(f"{name}." for name in AXES["engine"].names())
    other = [
        key for key in [*now, *(key for key in then if key not in now)]
        if then.get(key) != now.get(key) and key not in LATER and not key.startswith(engines)
    ]  # fmt: skip
    if other:
        said = ", ".join(f"{key}={show(now.get(key))} instead of {show(then.get(key))}" for key in other[:3])
        raise ValueError(
            f"{path} would be another experiment with {said}; leave that out, or start a new run, "
            f"from its weights with init={path}"
        )
    return s


def ensure(s: Settings, plain: bool = False, quiet: bool = False, plots: bool = True) -> Outcome:
    """The finished run of these settings: found, resumed or run now."""
    check(s)
    for path in folders.same(Path(s["folder"]), s.fingerprint()):
        if folders.facts_of(path).get("finished"):
            return Outcome(path, "found", rows_of(path), case=s["case"])
        return go_on(path, None, plain, quiet, plots)
    return start(s, plain, quiet, plots)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rounds of a finished run."""
    from lilliput.report.runs import read

    return read(path).rows


def _run(
    built: Built, path: Path, how: Literal["ran", "resumed"], noting: folders.Noting, plain: bool, quiet: bool,
    plots: bool,
) -> Outcome:  # fmt: skip
    experiment, began = built.experiment, time.perf_counter()
    experiment.folder = path
    try:
        experiment.reporters = [*_reporters(built.settings, path, plain, quiet), noting]
        history = experiment.run(built.engine, resume=how == "resumed")
        folders.note(path, {"finished": _now(), "stopped": history.stopped, "tuning": history.tuning})
    except BaseException as error:
        if noting.begun:
            error.lilliput_folder = path  # type: ignore[attr-defined]
        raise
    if plots and built.settings["plots"]:
        _plots(built, path, history.rows)
    return Outcome(path, how, history.rows, seconds=time.perf_counter() - began, case=built.settings["case"])


def _reporters(s: Settings, path: Path, plain: bool, quiet: bool) -> list[Any]:
    from lilliput.report import TensorBoard, WandB, live

    found: list[Any] = [] if quiet else [live(plain=plain)]
    if s["tensorboard"] and installed("tensorboard"):
        found.append(TensorBoard(path / "tb"))
    if s["wandb"]:
        found.append(WandB(path, config=s.as_dict()))
    return found


def _plots(built: Built, path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Figures of the run and its data, where matplotlib is installed and there are two points to join."""
    metric = headline(rows)
    if metric is None or sum(metric[0] in row for row in rows) < 2 or not installed("matplotlib"):
        return
    from lilliput.data import picture
    from lilliput.report import compare

    compare([path]).figures(path / "plots")
    picture(built.dataset, built.federated.partition, path / "plots" / "partition.pdf")


def _facts(s: Settings, built: Built) -> dict[str, Any]:
    """What environment.json says from the start."""
    made = {"fingerprint": s.fingerprint(), "started": _now(), "command": sys.argv, **environment()}
    return {**made, **_data(built), "sources": s.sources()}


def _data(built: Built) -> dict[str, str]:
    """The fingerprints of what a run trains on, and of how it lies on the clients."""
    return {"data": built.dataset.fingerprint(), "partition": built.federated.fingerprint}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def describe(outcome: Outcome) -> str:
    """An outcome in one line."""
    from lilliput.report.text import duration, number

    if outcome.how == "failed":
        return f"failed: {outcome.error}"
    if outcome.how == "twice":
        return "the same run as another of this sweep"
    found = last(outcome.rows)
    parts = [f"{found[0]} {number(*found)}"] if found else []
    parts += [f"{outcome.rows[-1]['round']} rounds"] if outcome.rows else []
    parts += [duration(outcome.seconds)] if outcome.seconds else []
    how = {"ran": "", "resumed": "resumed, ", "found": "finished before, "}[outcome.how]
    return f"{how}{', '.join(parts)}  {outcome.folder}"
