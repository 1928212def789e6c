"""The memory and FLOPs of the ledger against torch's CPU allocator, which knows nothing of ours, and closed forms."""

from __future__ import annotations

import pytest

import memory


@pytest.mark.parametrize("name", ["resnet18", "gpt2"])
def test_the_ledger_agrees_with_the_allocator_and_with_the_shapes(name: str) -> None:
    """Only the allocator sees the scratch of convolutions, which depends on the CPU.  FLOPs exactly."""
    if name == "gpt2":
        pytest.importorskip("transformers")
    found = memory.compared(name, quick=True, batch=16)
    least = 0.8 if name == "resnet18" else 0.85
    for part in ("whole", "device"):
        assert least <= found[part]["ledger_bytes"] / found[part]["allocator_bytes"] <= 1.02
    assert found["whole"]["flops"] == pytest.approx(found["whole"]["by_shape"], rel=1e-12)
    assert found["device_over_whole"]["allocator_bytes"] < 0.8
