"""InCo Aggregation's mixing replays the recorded deltas of the published program."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lilliput.algorithms.inco import mix

CASES = ("small", "opposed", "zeros", "large", "ratio", "ratio_clamp1", "skips")


@pytest.mark.parametrize("case", CASES)
def test_the_recorded_deltas(shared: Path, case: str) -> None:
    recorded = load_file(shared / "golden" / "heterogeneous" / "inco_resnet.safetensors")
    given, expected = (
        {n.removeprefix(f"{case}/{side}/"): x for n, x in recorded.items() if n.startswith(f"{case}/{side}/")}
        for side in ("in", "out")
    )
    found = mix(given, "published", float(recorded.get(f"{case}/clamp_max", 5.0)))
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, atol=2e-6, rtol=0)
    changed = {name for name, x in given.items() if not torch.equal(x, expected[name])}
    assert changed and all(torch.equal(found[name], given[name]) for name in given.keys() - changed)
