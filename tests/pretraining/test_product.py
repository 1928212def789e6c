"""Two processes take the step of one, however they take it: per layer, in passes, side by side or in shards."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from product_processes import cases, plainly, silenced, text, trained
from torch import Tensor

from lilliput.pretraining.run import Run

pytest.importorskip("transformers")
DRAWN = sorted(random.Random(0).sample(range(len(cases())), 6))


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((x - b[name]).abs().max()) for name, x in a.items())


def compare(folder: Path, numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    text(folder)
    script = Path(__file__).with_name("product_processes.py")
    ended = subprocess.run([sys.executable, script, folder, *map(str, numbers)], capture_output=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr.decode()
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert min(first["seen"]) > 0 and min(second["seen"]) == 0  # labels of a pass that count
    for found in (first, second):  # 1 + 2 a pass, though both weights' gradients lie in one memory
        assert [[*map(Tensor.tolist, grads)] for grads in found["shared"]] == [2 * [4 * [3.0]], 2 * [4 * [6.0]]]
    monkeypatch.setattr(Run, "_part", Run._part)  # to be put back
    silenced([])
    alone: dict[str, dict[str, Tensor]] = {}
    start = trained(folder, cases()[0], lr=1e-12)
    for n in numbers:
        plain = plainly(cases()[n])
        one = alone.setdefault(json.dumps(plain), trained(folder, plain))
        assert apart(first["weights"][str(n)], second["weights"][str(n)]) == 0, cases()[n]
        assert apart(one, first["weights"][str(n)]) < 2e-6 < 1e-4 < apart(one, start), cases()[n]


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(tmp_path, DRAWN, monkeypatch)


@pytest.mark.slow
def test_two_processes_take_the_step_of_one_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(tmp_path, [n for n in range(len(cases())) if n not in DRAWN], monkeypatch)
