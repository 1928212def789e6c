"""The settings are scoped, honest about precision, and off by one switch."""

from __future__ import annotations

import pytest
import torch

from lilliput.lean import policy


def state() -> tuple[int, str]:
    return torch.get_num_threads(), torch.get_float32_matmul_precision()


def test_settings_are_undone_even_after_an_error() -> None:
    before = state()
    with pytest.raises(ZeroDivisionError), policy.tuned(threads=before[0] + 1) as report:
        assert state() == (report["threads"], report["float32_matmul"])
        assert report["threads"] == before[0] + 1
        assert 1 / 0
    assert state() == before


def test_one_switch_leaves_everything_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_TUNING", "0")
    before = state()
    with policy.tuned() as report, policy.fast(torch.device("cpu")):
        assert state() == before
        assert report == {"threads": before[0], "float32_matmul": before[1]}


def test_small_products_stay_with_the_default_library() -> None:
    before = state()
    with policy.tuned(large_products=False):
        assert state() == before


@pytest.mark.skipif(not policy.exact(), reason="this CPU has AMX, or it cannot be told: the setting is not used here")
def test_fast_products_are_as_exact_as_float32() -> None:
    """bfloat16 products would be off by 2e-3; float32 sums of 512 terms by about 4e-7."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, m, generator=generator) for n, m in ((256, 512), (512, 384)))
    with policy.fast(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "medium"
        found = a @ b
    exact = a.double() @ b.double()
    assert (found - exact).norm() / exact.norm() < 1e-6
