"""Recipes at the scale that continuous integration can afford, on real data."""

from pathlib import Path

import pytest

from lilliput.cli import main


@pytest.mark.slow
def test_the_cnn_on_cifar10_learns_as_it_did_when_calibrated(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shared / "data" / "cifar10"
    code = main(["run", "recipe=fedavg/cifar10_cnn", "scale=small", f"cifar10.folder={folder}", "--check"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "reproduced" in said and "not reproduced" not in said
