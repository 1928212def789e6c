"""`lilliput run -m`: every combination of several values, by Hydra's sweeper and launchers.

Hydra expands the values and starts the jobs (one after another, `hydra/launcher=joblib` on several cores, submitit on
a cluster).  Each job is one `lilliput run` of its own words, and runs only what is not finished: a sweep typed again
does what is missing.  All combinations are checked before the first starts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.cli.execute import Outcome, describe, ensure
from lilliput.cli.run_words import Args
from lilliput.config import Settings, changed, expanded, words
from lilliput.config.axes import AXES
from lilliput.config.checks import check
from lilliput.config.layers import given
from lilliput.config.shared import top
from lilliput.config.values import is_one, parse, show

TYPED = "as_typed."  # keys that are not in Hydra's tree as they stand: `partition.alpha`, published keys


def sweep(args: Args) -> int:
    """Run the sweep; the exit status is that of its worst job."""
    _need_hydra()
    typed = [_for_hydra(word) for word in args.settings]
    jobs = combinations(typed)
    _refuse_unused(args, jobs)
    launcher = next((w.partition("=")[2] for w in args.hydra if w.startswith("hydra/launcher=")), "basic")
    job = Job(args, plain=args.plain, quiet=launcher != "basic", varied=_varied(jobs))
    with _sweep_folder(launcher, args, jobs) as where:
        outcomes = list(_outcomes(_launch(job, typed, args.hydra, where)))
    counts = {how: sum(o.how == how for o in outcomes) for how in ("ran", "resumed", "found", "twice", "failed")}
    print(", ".join(f"{count} {_WORDS[how]}" for how, count in counts.items() if count))
    return max(o.status for o in outcomes)


_WORDS = {how: how for how in ("ran", "resumed", "failed")} | {"found": "finished before", "twice": "asked for twice"}


def _need_hydra() -> None:
    try:
        import hydra  # noqa: F401
        import hydra_zen  # noqa: F401
    except ImportError as error:
        raise ValueError(f"a sweep needs Hydra ({error}); pip install 'lilliput[run]'") from None


def _for_hydra(word: str) -> str:
    """A word in Hydra's grammar: keys that its tree lacks under a prefix, values that it cannot read in quotes."""
    key, sign, value = word.partition("=")
    if not sign or not key:
        raise ValueError(f"{word!r} is no setting; write key=value")
    key = key.lstrip("+")
    if is_one(value) or not _hydra_reads(value):
        (read,) = words([word]).values()  # what we cannot read either is refused in our words
        value = show(read)
    return f"{key}={value}" if _in_tree(key) else f"+{TYPED}{key}={value}"


def _hydra_reads(value: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True


def _in_tree(key: str) -> bool:
    tree: Any = _tree()
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return False
        tree = tree[part]
    return True


def _tree() -> dict[str, Any]:
    """Every setting with its default, and the node of every name: what Hydra composes."""
    tree: dict[str, Any] = {name: f.default for name, f in top().items()}
    for axis in AXES.values():
        for choice in axis.nodes():
            defaults = {name: f.default for name, f in axis.fields(choice.target).items()}
            node = {name: dict(x) if isinstance(x, Mapping) else x for name, x in defaults.items()}
            if choice.name not in top():
                tree.setdefault(choice.name, {}).update(node)
    return tree


def combinations(typed: Sequence[str]) -> list[list[str]]:
    """The words of each job, as Hydra's sweeper will expand them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(typed)), None)[0]
    except HydraException as error:  # ranges that only another sweeper expands: its jobs are checked as they come
        if "does not support sweep type" in str(error):
            return []
        raise ValueError(str(error)) from None


def _settings(args: Args, job: Sequence[str]) -> list[Settings]:
    """The runs of one job, checked."""
    own = [word.lstrip("+").removeprefix(TYPED) for word in job]
    chosen = expanded(*given(own, args.config), sweep=True)
    for s in chosen:
        check(s)
    return chosen


def _refuse_unused(args: Args, jobs: Sequence[Sequence[str]]) -> None:
    """Check every run; raise ValueError for a setting that none of them has a use for."""
    runs = [s for job in jobs for s in _settings(args, job)]
    unused = frozenset.intersection(*(frozenset(s.notes) for s in runs)) if runs else frozenset()
    for key in unused:
        remark = runs[0].notes[key]
        raise ValueError(remark if remark.startswith("there is no") else f"{remark}, nor in any other run of the sweep")


def _varied(jobs: Sequence[Sequence[str]]) -> frozenset[str]:
    """The keys that differ between jobs."""
    values: dict[str, set[str]] = {}
    for word in (word for job in jobs for word in job):
        key, _, value = word.partition("=")
        values.setdefault(key, set()).add(value)
    return frozenset(key for key, seen in values.items() if len(seen) > 1)


@contextmanager
def _sweep_folder(launcher: str, args: Args, jobs: Sequence[Sequence[str]]) -> Iterator[Path]:
    """A folder for Hydra's own files, gone when the sweep is; a cluster's jobs need one that they can reach."""
    if launcher.startswith("submitit"):
        root = _settings(args, jobs[0])[0]["folder"] if jobs else "runs"
        yield Path(root, ".sweeps", time.strftime("%Y-%m-%d_%H-%M-%S")).resolve()
        return
    where = Path(tempfile.mkdtemp(prefix="lilliput-sweep-"))
    try:
        yield where
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _launch(job: Job, typed: Sequence[str], hydra: Sequence[str], where: Path) -> Any:
    from hydra.errors import HydraException
    from hydra_zen import launch, make_config
    from omegaconf.errors import OmegaConfBaseException

    quiet = ["hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null", "hydra.job.chdir=false"]
    place = [f"hydra.sweep.dir={where}", "hydra.sweep.subdir=${hydra.job.num}"]
    try:
        return launch(
            make_config(**_tree()), job, [*quiet, *place, *typed, *hydra], multirun=True, version_base="1.3",
            job_name="lilliput", with_log_configuration=False, to_dictconfig=True,
        )  # fmt: skip
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from None


def _outcomes(returned: Any) -> Iterator[Outcome]:
    """Every run's outcome, out of what the launcher returns: batches of jobs of runs."""
    if isinstance(returned, Outcome):
        yield returned
    elif isinstance(returned, list | tuple):
        for item in returned:
            yield from _outcomes(item)
    elif returned is not None:
        yield from _outcomes(returned.return_value)


@dataclass(frozen=True)
class Job:
    """One job of a sweep, in whatever process a launcher calls it."""

    args: Args
    plain: bool
    quiet: bool
    varied: frozenset[str]

    def __call__(self, config: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig

        hydra = HydraConfig.get()
        own = [word for word in hydra.overrides.task if not word.startswith("hydra")]
        mine = [_plainly(w) for w in own if w.partition("=")[0] in self.varied]
        label = " ".join(mine)
        outcomes = [self._run(s, Path(hydra.sweep.dir)) for s in _named(_settings(self.args, own), mine)]
        for outcome in outcomes:
            print(f"[{hydra.job.num + 1}] {label or 'the run'}: {describe(outcome)}", flush=True)
        return outcomes[0] if len(outcomes) == 1 else outcomes

    def _run(self, s: Settings, where: Path) -> Outcome:
        from lilliput.cli import explain

        try:
            if not _claim(where, s):
                return Outcome(where, "twice")
            return ensure(s, self.plain, self.quiet, plots=False)
        except Exception as error:
            if os.environ.get("LILLIPUT_DEBUG", "0") not in ("", "0"):
                raise
            status, line = explain(error)
            return Outcome(where, "failed", error=line, status=status)


def _plainly(word: str) -> str:
    """A word of Hydra's as a user types it."""
    key, _, value = word.lstrip("+").removeprefix(TYPED).partition("=")
    return f"{key}={show(parse(value))}"


def _named(chosen: Sequence[Settings], words: Sequence[str]) -> list[Settings]:
    """The runs of a job; a name given to the whole sweep holds each of them by what sets it apart."""
    if chosen[0]["name"] is None or not words:
        return list(chosen)
    apart = ",".join(words).replace(" ", "").replace("/", "-")
    return [changed(s, {"name": f"{s['name']}/{apart}"}) for s in chosen]


def _claim(where: Path, s: Settings) -> bool:
    """Whether this is the first job of the sweep to ask for this run; with a name, under that name."""
    where.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(where / f"{s.fingerprint()}.claim", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
