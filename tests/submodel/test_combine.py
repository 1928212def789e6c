"""Means over replies are right in every dtype that has one, however many replies there are."""

import pytest
import torch

from lilliput.core.fleet import Reply
from lilliput.submodel.combine import Mean, Sum
from lilliput.submodel.slices import WHOLE, Slice


def mean(x, deltas, examples=None, held=WHOLE, rule=Mean):
    total = rule().over(x)
    for i, delta in enumerate(deltas):
        total.add(Reply(i, {}, (examples or [1] * len(deltas))[i], {}), delta, held)
    return total.result()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("held", [WHOLE, Slice({"w:0": torch.tensor([0, 2])})], ids=["whole", "slice"])
def test_a_thousand_equal_deltas_have_themselves_as_their_mean(dtype, held):
    x = {"w": torch.zeros(3, dtype=dtype)}
    delta = held.gather({"w": torch.ones(3, dtype=dtype)})
    found = mean(x, [delta] * 1000, held=held)["w"]
    assert found.dtype == dtype
    assert torch.equal(found, held.scatter_add(delta, {"w": torch.zeros(3, dtype=dtype)})["w"])


def test_a_sum_is_as_wide():
    x = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    assert mean(x, [{"w": torch.ones(1, dtype=torch.bfloat16)}] * 1000, rule=Sum)["w"] == 1000


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_equal_whole_numbers_have_themselves_as_their_mean(dtype):
    """Weights such as 7 / 3 are not exact, and a mean of 9.999... would be 9."""
    x, delta = {"n": torch.tensor(0, dtype=dtype)}, {"n": torch.tensor(10, dtype=dtype)}
    for examples in ([3, 7, 11], [7, 3, 13, 29], [49, 1, 5]):
        assert mean(x, [delta] * len(examples), examples)["n"] == 10


def test_whole_numbers_are_truncated():
    x = {"n": torch.tensor(0)}
    assert mean(x, [{"n": torch.tensor(2)}, {"n": torch.tensor(3)}])["n"] == 2


def test_a_reply_without_labels_that_count_moves_nothing():
    x, deltas = {"w": torch.zeros(2)}, [{"w": torch.full((2,), v)} for v in (5.0, 1.0)]
    assert torch.equal(mean(x, deltas, [0, 4])["w"], torch.ones(2))
    assert torch.equal(mean(x, deltas, [0, 0])["w"], torch.zeros(2))
    with pytest.raises(ValueError, match="no client replied"):
        mean(x, [])


def test_what_has_no_mean_is_refused_by_name():
    with pytest.raises(ValueError, match="seen is true or false, which has no mean; use buffers=local"):
        Mean().over({"w": torch.zeros(2), "seen": torch.tensor(True)})
