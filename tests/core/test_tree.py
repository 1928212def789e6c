import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.core import random, tree

SHAPES = {"w": (3, 4), "b": (3,), "s": ()}


def draw(*labels: object) -> tree.Tree:
    """A tree of small integers, on which float arithmetic is exact."""
    generator = random.generator("tree", *labels)
    return {name: torch.randint(-9, 10, shape, generator=generator).float() for name, shape in SHAPES.items()}


def equal(a: tree.Tree, b: tree.Tree) -> bool:
    return list(a) == list(b) and all(torch.equal(x, b[name]) and x.dtype == b[name].dtype for name, x in a.items())


seeds = st.integers(0, 1000)
factors = st.integers(-8, 8).map(lambda n: n / 4)


@given(seeds, factors)
@settings(deadline=None)
def test_trees_are_a_vector_space(seed, factor):
    a, b, c = (draw(seed, i) for i in range(3))
    assert equal(tree.add(a, b), tree.add(b, a))
    assert equal(tree.add(tree.add(a, b), c), tree.add(a, tree.add(b, c)))
    assert equal(tree.add(a, tree.sub(b, a)), b)  # before + delta == after
    assert equal(tree.sub(a, a), tree.zeros_like(a))
    assert equal(tree.add(a, b, factor), tree.add(a, tree.scale(b, factor)))
    assert equal(tree.scale(tree.add(a, b), factor), tree.add(tree.scale(a, factor), tree.scale(b, factor)))


@given(seeds, factors)
@settings(deadline=None)
def test_the_inner_product_is_bilinear_and_the_norm_its_root(seed, factor):
    a, b, c = (draw(seed, i) for i in range(3))
    assert tree.dot(a, b) == tree.dot(b, a)
    assert tree.dot(tree.add(a, c, factor), b) == tree.dot(a, b) + factor * tree.dot(c, b)
    assert tree.norm(a).square().item() == pytest.approx(tree.dot(a, a).item())
    assert tree.norm(tree.scale(a, factor)).item() == pytest.approx(abs(factor) * tree.norm(a).item())


def test_the_inner_product_keeps_small_terms():
    # In float32, 1e8 + 1 == 1e8: the term of b would be lost.
    a = {"a": torch.tensor([1e4]), "b": torch.tensor([1.0])}
    assert tree.dot(a, a).item() == 1e8 + 1


def test_mean_weighs_and_streams():
    a, b = draw(1), draw(2)
    assert equal(tree.mean(iter([a, b])), tree.scale(tree.add(a, b), 0.5))
    assert equal(tree.mean([a, b], [3, 1]), tree.scale(tree.add(tree.scale(a, 3), b), 0.25))
    assert equal(tree.mean([a]), a)
    with pytest.raises(ValueError, match="no trees"):
        tree.mean([])


def test_functions_leave_their_arguments_alone_except_those_in_place():
    a, b = draw(1), draw(2)
    before = tree.clone(a), tree.clone(b)
    tree.add(a, b), tree.sub(a, b), tree.scale(a, 2.0), tree.mean([a, b], [1.0, 2.0]), tree.dot(a, b)
    assert equal(a, before[0]) and equal(b, before[1])
    where = {name: x.data_ptr() for name, x in a.items()}
    assert tree.add_(a, b, 2.0) is a
    assert equal(a, tree.add(before[0], b, 2.0))
    assert tree.copy_(a, b) is a
    assert equal(a, b) and {name: x.data_ptr() for name, x in a.items()} == where


def test_copy_in_place_reaches_across_dtypes_and_keeps_them():
    a = {"w": torch.zeros(3, dtype=torch.float64, requires_grad=True)}
    tree.copy_(a, {"w": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)})
    assert a["w"].dtype is torch.float64 and a["w"].tolist() == [1, 2, 3]


def test_a_clone_shares_neither_memory_nor_graph():
    a = {"w": torch.ones(3, requires_grad=True)}
    b = tree.clone(a)
    b["w"].zero_()
    assert a["w"].tolist() == [1, 1, 1] and not b["w"].requires_grad


@pytest.mark.parametrize("function", [tree.add, tree.sub, tree.add_, tree.copy_, tree.dot])
def test_trees_of_different_names_do_not_combine(function):
    with pytest.raises(ValueError, match=r"differ in their names: \['b', 'c'\]"):
        function({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "c": torch.ones(1)})


def test_names_match_whatever_their_order():
    a = draw(1)
    b = dict(reversed(draw(2).items()))
    assert equal(tree.add(a, b), {name: a[name] + b[name] for name in a})


def test_the_empty_tree_is_a_tree():
    assert tree.add({}, {}) == tree.sub({}, {}) == tree.scale({}, 2.0) == tree.add_({}, {}) == tree.copy_({}, {}) == {}
    assert tree.dot({}, {}) == 0 and tree.size({}) == 0


def test_size_and_tensors_count_every_tensor_of_a_body_once_in_order():
    body = {"a": {"x": torch.zeros(2), "n": 3}, "b": torch.zeros(5, dtype=torch.int64), "c": None}
    assert [x.numel() for x in tree.tensors(body)] == [2, 5]
    assert tree.size({"x": torch.zeros(2), "y": torch.zeros(5, dtype=torch.int64)}) == 2 * 4 + 5 * 8


def test_shapes_tell_architectures_apart():
    assert tree.shapes(draw(1)) == tree.shapes(draw(2)) == (("w", (3, 4)), ("b", (3,)), ("s", ()))
    assert tree.shapes({"w": torch.zeros(4, 3)}) != tree.shapes({"w": torch.zeros(3, 4)})
    assert hash(tree.shapes(draw(1))) == hash(tree.shapes(draw(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_norm_of_a_finite_half_precision_tensor_is_finite(dtype: torch.dtype) -> None:
    """64 entries of 60,000 have a norm of 480,000, beyond float16's largest number."""
    assert tree.norms([torch.full((64,), 60000.0, dtype=dtype)])[0] == pytest.approx(480000, rel=1e-2)
    assert tree.norms([]) == []
