"""SplitFed v1 holds its server copies in windows, and no number depends on how wide they are."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from fixtures import assert_same_history, batches
from split_toys import run, three_parts, two_parts
from test_split_methods import Boaster

import lilliput
from lilliput import Profile
from lilliput.algorithms import SplitFedV1, splitfed_v1
from lilliput.algorithms.splitting.half import Half
from lilliput.engines import Sequential, Workers
from lilliput.engines.dry import predict
from lilliput.wire import codecs

SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "local_epochs": 2, "cohort": 5}
SERVER = 4 * (8 * 3 + 3)  # bytes of the server's part
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "reset": {"settings": {"optimizer_state": "reset"}},
    "local": {"settings": {"buffers": "local"}},
    "clipped": {"settings": {"clip": 0.1}},
    "tail": {"on": lambda: three_parts(norm=False)},
    "coded": {"codec": "int8:activations+bf16"},
    "workers": {"engine": lambda: Workers(2), "codec": "int8:activations+bf16"},
    "failing": {"method": Boaster, "settings": {"clip": 0.1}},
    "spilled": {"store_bytes": 100},
}


def ended(case: str, folder: Path) -> tuple[Any, list[Any]]:
    """The history, and the lines of the ledger without what the machine's clock says."""
    options = {"on": two_parts, "method": SplitFedV1, "engine": Sequential, "settings": {}, **CASES[case]}
    method = options.pop("method")(**SETTINGS | options.pop("settings"))
    if "codec" in options:
        options["codec"] = codecs.build(options["codec"])
    profiles = {c: Profile(up_bps=1e4 * (1 + c), down_bps=1e5 / (1 + c)) for c in batches()}
    history = run(
        method, options.pop("on")(), engine=options.pop("engine")(), folder=folder, profiles=profiles, **options
    )
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    for line in lines:
        line["slowest"].sort()
        for entry in line["calls"]:
            del entry["seconds"]
    return history, lines


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_no_number_depends_on_the_windows(
    case: str, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States, rows with their simulated clock, and ledgers; codecs draw by the number of a call."""
    whole, lines = ended(case, tmp_path / "whole")
    monkeypatch.setattr(
        splitfed_v1, "windows", lambda cohort, size: [cohort[i : i + width] for i in range(0, 5, width)]
    )
    narrow, others = ended(case, tmp_path / "narrow")
    assert_same_history(narrow, whole)
    assert others == lines


def test_a_windows_copies_alone_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitfed_v1, "WINDOW_BYTES", 2 * SERVER)
    live: Any = weakref.WeakSet()
    most = []
    server = SplitFedV1.server

    def counted(self: Any, *args: Any) -> Half:
        half = server(self, *args)
        live.add(half)
        gc.collect()
        most.append(len(live))
        return half

    monkeypatch.setattr(SplitFedV1, "server", counted)
    run(SplitFedV1(**SETTINGS | {"cohort": None}), two_parts(), rounds=1)
    assert most == [1, 2, 1, 2, 1, 2]


def test_the_dry_engine_foretells_any_windows(monkeypatch: pytest.MonkeyPatch) -> None:

    made = [
        lilliput.Experiment(SplitFedV1(**SETTINGS), two_parts(), batches(), rounds=2, evaluate="none") for _ in "ab"
    ]
    monkeypatch.setattr(splitfed_v1, "WINDOW_BYTES", 1)
    rows = made[0].run(Sequential(wire=True)).rows
    assert [[row[k] for k in ("up_bytes", "down_bytes", "simulated_seconds")] for row in predict(made[1]).rows] == [
        [row[k] for k in ("up_bytes", "down_bytes", "simulated_seconds")] for row in rows
    ]
