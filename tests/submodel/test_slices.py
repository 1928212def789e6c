"""Slices: gather and scatter are inverse, and means run over those who hold a coordinate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput import Slice
from lilliput.core.fleet import Reply
from lilliput.core.tree import Tree
from lilliput.submodel import Mean, Sum, reduce

LAYOUT = {"hidden": [("a.weight", 0), ("a.bias", 0), ("b.weight", 1)]}


def full() -> Tree:
    return {
        "a.weight": torch.arange(12.0).view(4, 3),
        "a.bias": torch.arange(4.0),
        "b.weight": torch.arange(8.0).view(2, 4),
    }


def held(*indices: int) -> Slice:
    return Slice({"hidden": torch.tensor(indices, dtype=torch.int64)}, LAYOUT)


def test_gather_takes_the_rows_and_columns_held() -> None:
    x, part = full(), held(1, 3).gather(full())
    assert torch.equal(part["a.weight"], x["a.weight"][[1, 3]])
    assert torch.equal(part["b.weight"], x["b.weight"][:, [1, 3]])
    assert torch.equal(part["a.bias"], torch.tensor([1.0, 3.0]))


@given(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 2)))
@settings(max_examples=50, deadline=None)
def test_scatter_undoes_gather(rows: set[int], columns: set[int]) -> None:
    axes = {
        "a.weight:0": torch.tensor(sorted(rows), dtype=torch.int64),
        "a.weight:1": torch.tensor(sorted(columns), dtype=torch.int64),
    }
    slice_, x = Slice(axes), full()
    assert all(torch.equal(v, x[k]) for k, v in slice_.scatter(slice_.gather(x), full()).items())
    zero = {k: torch.zeros_like(v) for k, v in x.items()}
    kept = slice_.scatter(slice_.gather(x), zero)["a.weight"]
    mask = torch.zeros(4, 3)
    for i in rows:
        for j in columns:
            mask[i, j] = 1
    assert torch.equal(kept, x["a.weight"] * mask)


def test_a_slice_survives_its_own_message() -> None:
    back = Slice.of(held(0, 2).body())
    assert all(torch.equal(v, held(0, 2).gather(full())[k]) for k, v in back.gather(full()).items())
    assert Slice.of(Slice().body()).is_full


def test_the_mean_of_a_coordinate_runs_over_its_holders() -> None:
    """Clients 0 and 1 hold units {0, 1} and {1, 2}, 1 and 3 examples, deltas 4 and 8: 4, (4 + 24) / 4, 8, none."""
    slices = {0: held(0, 1), 1: held(1, 2)}
    replies = [Reply(c, {"delta": {"a.bias": torch.full((2,), d)}}, n, {}) for c, n, d in ((0, 1, 4.0), (1, 3, 8.0))]
    mean = reduce(replies, slices, delta=Mean("labels").over({"a.bias": torch.zeros(4)}))["delta"]
    assert mean["a.bias"].tolist() == [4.0, 7.0, 8.0, 0.0]
    total = reduce(replies, slices, delta=Sum().over({"a.bias": torch.zeros(4)}))["delta"]
    assert total["a.bias"].tolist() == [4.0, 12.0, 8.0, 0.0]
    weighted = reduce(replies[::-1], slices, delta=Sum("labels").over({"a.bias": torch.zeros(4)}))["delta"]
    assert weighted["a.bias"].tolist() == [4.0, 28.0, 24.0, 0.0]


def test_whole_and_cut_models_mix() -> None:
    slices = {0: Slice(), 1: held(3)}
    replies = [
        Reply(0, {"delta": {"a.bias": torch.ones(4)}}, 1, {}),
        Reply(1, {"delta": {"a.bias": torch.full((1,), 5.0)}}, 1, {}),
    ]
    mean = reduce(replies, slices, delta=Mean("uniform").over({"a.bias": torch.zeros(4)}))["delta"]
    assert mean["a.bias"].tolist() == [1.0, 1.0, 1.0, 3.0]


def test_the_mean_of_one_is_itself_to_the_bit() -> None:
    x = {"w": torch.randn(1000)}
    mean = reduce([Reply(0, {"delta": x}, 7, {})], delta=Mean("labels").over(x))["delta"]
    assert torch.equal(mean["w"], x["w"])


def test_a_parameter_of_which_nothing_is_held_is_not_there() -> None:
    assert "a.bias" not in held().gather(full())


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"a.bias:0": torch.tensor([2, 1])}, "ascending"),
        ({"a.bias:0": torch.tensor([1, 1])}, "ascending"),
        ({"a.bias:0": torch.tensor([0.0])}, "int64"),
        ({"width": torch.tensor([0])}, "not in the layout"),
        ({"hidden": torch.tensor([0]), "a.bias:0": torch.tensor([0])}, "cut by two axes"),
    ],
)
def test_a_slice_that_makes_no_sense_is_refused(axes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Slice(axes, LAYOUT)


def test_an_index_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"index 9 of 'a.bias':0, which has 4"):
        Slice({"a.bias:0": torch.tensor([9])}).gather(full())


def test_no_replies_cannot_be_combined() -> None:
    with pytest.raises(ValueError, match="no client replied"):
        reduce([], delta=Mean().over(full()))
