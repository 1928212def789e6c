"""`lilliput` as a function: words in, (status, output, errors) out, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from saying import Cli, Runs, Said

from lilliput.cli import main


@pytest.fixture
def lilliput(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Cli:
    """Runs a command in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LILLIPUT_DEBUG", raising=False)

    def call(*words: str) -> Said:
        capsys.readouterr()
        status = main(words)
        return Said(status, *capsys.readouterr())

    return call


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """The folders of all runs so far."""
    return lambda: sorted(path.parent for path in tmp_path.rglob("config.yaml"))
