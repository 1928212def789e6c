"""Every partition gives every example to exactly one client, again and again the same."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.data import PARTITIONS, Dataset
from lilliput.data.partition import _proportions, split

LABELLED = sorted(set(PARTITIONS) - {"class_blocks", "fixed", "flwr", "natural"})  # what any labels can be parted by


def table(labels, owners=None, classes=None):
    labels = torch.as_tensor(labels, dtype=torch.int64)
    x = torch.arange(len(labels), dtype=torch.float32)[:, None]
    classes = classes or int(labels.max()) + 1
    return Dataset("table", (x, labels), (x[:1], labels[:1]), classes, owners=owners)


def counts(dataset, parts):
    """Examples (clients, classes)."""
    return np.stack([np.bincount(dataset.train[1][i], minlength=dataset.classes) for i in parts.values()])


@pytest.mark.parametrize("name", LABELLED)
@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda s: sum(s) > 20),
    clients=st.integers(1, 10), seed=st.integers(0, 2**40), alpha=st.sampled_from([1e-3, 0.1, 1.0, 1e4]),
)  # fmt: skip
def test_each_index_once_and_the_same_again(name, sizes, clients, seed, alpha):
    dataset = table(np.repeat(np.arange(len(sizes)), sizes), classes=len(sizes))
    options = {"alpha": alpha} if "dirichlet" in name or name == "quantity" else {}
    options |= {"classes_per_client": sum(s > 0 for s in sizes)} if name == "pathological" else {}
    try:
        parts = split(dataset, name, clients, seed, **options)
    except ValueError as error:  # a skewed draw may leave a client empty, which is refused with the remedy
        assert "without examples" in str(error) and "choose fewer clients" in str(error)
        assert name in ("dirichlet", "pathological")
        return
    assert sorted(parts) == list(range(clients))
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(sum(sizes)))
    assert all(len(part) for part in parts.values())
    again = split(dataset, name, clients, seed, **options)
    assert all(torch.equal(parts[c], again[c]) for c in parts)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "dirichlet_equal", "shards", "pathological", "quantity"])
def test_another_seed_is_another_partition(name):
    dataset = table(np.arange(1000) % 10)
    assert not torch.equal(split(dataset, name, 10, 0)[0], split(dataset, name, 10, 1)[0])


@pytest.mark.parametrize("name", ["iid", "dirichlet_equal", "shards"])
@pytest.mark.parametrize("alpha", [0.01, 0.5, 100.0])
def test_equal_sizes(name, alpha):
    dataset = table(np.arange(1003) ** 2 % 7)
    options = {"alpha": alpha} if name == "dirichlet_equal" else {}
    sizes = [len(part) for part in split(dataset, name, 10, 3, **options).values()]
    # Shards differ by one example each, and a client has two of them.
    assert max(sizes) - min(sizes) <= (2 if name == "shards" else 1)


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet_equal"])
def test_large_alpha_is_iid_and_small_alpha_is_not(name):
    """At alpha 1e6 a share strays by less than a thousandth of itself; dealing what rounding leaves adds a few."""
    dataset = table(np.arange(10_000) % 10)
    even = counts(dataset, split(dataset, name, 10, 0, alpha=1e6))
    assert abs(even - 100).max() <= 5
    skewed = counts(dataset, split(dataset, name, 10, 0, alpha=0.05))
    assert (skewed.max(1) / skewed.sum(1)).mean() > 0.5


def test_dirichlet_stops_feeding_a_client_that_has_its_even_share():
    """So no client exceeds the even share by more than the one class that took it there."""
    dataset = table(np.arange(2000) % 10)
    for seed in range(20):
        parts = split(dataset, "dirichlet", 8, seed, alpha=0.3)
        assert max(len(p) for p in parts.values()) < 2000 / 8 + 200
        assert min(len(p) for p in parts.values()) >= 10


def test_dirichlet_takes_the_best_draw_where_the_minimum_cannot_be_had():
    parts = split(table(np.arange(60) % 3), "dirichlet", 10, 0, alpha=0.5)  # six each at best
    assert min(len(p) for p in parts.values()) >= 1


def test_dirichlet_equal_keeps_the_mix_where_the_classes_are_unequal():
    dataset = table(np.repeat([0, 1, 2], [6000, 3000, 1000]))
    assert abs(counts(dataset, split(dataset, "dirichlet_equal", 10, 1, alpha=1e6)) - [600, 300, 100]).max() <= 5


def test_shards_hold_few_classes():
    dataset = table(np.random.default_rng(0).permutation(np.arange(1000) % 10))
    held = counts(dataset, split(dataset, "shards", 10, 0, shards_per_client=2)) > 0
    assert held.sum(1).max() <= 2  # each of 20 shards is half of one class


@pytest.mark.parametrize("classes", [1, 2, 5, 10])
def test_pathological_clients_have_exactly_their_classes(classes):
    dataset = table(np.arange(2000) % 10)
    held = counts(dataset, split(dataset, "pathological", 20, 0, classes_per_client=classes)) > 0
    assert (held.sum(1) == classes).all()
    assert (held.sum(0) == 2 * classes).all()  # as many holders of every class


def test_pathological_refuses_classes_of_nobody():
    with pytest.raises(ValueError, match="classes_per_client >= 4"):
        split(table(np.arange(100) % 10), "pathological", 3, 0, classes_per_client=2)


@pytest.mark.parametrize(
    ("classes", "clients", "blocks"), [(100, 4, [25] * 4), (10, 4, [3, 3, 2, 2]), (5, 5, [1] * 5), (3, 1, [3])]
)
def test_class_blocks_are_runs_of_classes(classes, clients, blocks):
    dataset = table(np.random.default_rng(0).permutation(np.arange(20 * classes) % classes))
    held = counts(dataset, split(dataset, "class_blocks", clients))
    assert (held > 0).sum(1).tolist() == blocks and held.max() == 20
    assert (held > 0).argmax(1).tolist() == np.cumsum([0, *blocks[:-1]]).tolist()  # each begins where the last ended


def test_class_blocks_pass_over_classes_that_nobody_has():
    parts = split(table([1, 1, 4, 4, 7], classes=9), "class_blocks", 3)
    assert {c: part.tolist() for c, part in parts.items()} == {0: [0, 1], 1: [2, 3], 2: [4]}


def test_class_blocks_refuse_more_clients_than_classes():
    with pytest.raises(ValueError, match="clients is 4; table has 3 classes"):
        split(table([0, 1, 2, 2, 2]), "class_blocks", 4)


def test_quantity_keeps_the_minimum():
    sizes = [len(p) for p in split(table(np.arange(5000) % 10), "quantity", 20, 0, alpha=0.05).values()]
    assert min(sizes) >= 10 and max(sizes) > 1000


def test_natural_clients_are_the_owners_and_are_never_cut():
    owners = torch.tensor([0, 2, 1, 2, 0, 3, 3, 3])
    dataset = table(torch.zeros(8), owners)
    parts = split(dataset, "natural", 4)
    assert [p.tolist() for p in parts.values()] == [[0, 4], [2], [1, 3], [5, 6, 7]]
    two = split(dataset, "natural", 2, 5)
    assert not set(owners[two[0]].tolist()) & set(owners[two[1]].tolist())
    with pytest.raises(ValueError, match="choose clients <= 4"):
        split(dataset, "natural", 5)
    with pytest.raises(ValueError, match="no clients of its own"):
        split(table(torch.zeros(8)), "natural", 2)


def test_a_partition_written_down(tmp_path):
    dataset = table(torch.zeros(4))
    file = tmp_path / "map.json"
    file.write_text(json.dumps({"7": [3, 0], "9": [1, 2]}))
    parts = split(dataset, "fixed", 2, file=str(file))
    assert {c: p.tolist() for c, p in parts.items()} == {7: [0, 3], 9: [1, 2]}
    assert {c: p.tolist() for c, p in split(dataset, {7: [3, 0], 9: [1, 2]}).items()} == {7: [0, 3], 9: [1, 2]}
    with pytest.raises(ValueError, match="no partition file"):
        split(dataset, "fixed", 2, file="nowhere.json")
    file.write_text("[1, 2")
    with pytest.raises(ValueError, match="is not a partition"):
        split(dataset, "fixed", 2, file=str(file))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({0: [0, 1], 1: []}, "leaves 1 of 2 clients without examples"),
        ({0: [0, 1], 1: [1, 2, 3]}, "5 indices, 4 of them distinct"),
        ({0: [0], 1: [1, 2]}, "every index from 0 to 3 must occur exactly once"),
        ({0: [0, 1], 1: [2, 4]}, "every index from 0 to 3 must occur exactly once"),
    ],
)
def test_a_partition_that_is_none_is_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        split(table(torch.zeros(4)), parts)


@pytest.mark.parametrize(
    ("name", "clients", "options", "words"),
    [
        ("iid", 0, {}, "clients is 0"),
        ("iid", 41, {}, "choose 1 to 40"),
        ("dirichlet", 4, {"alpha": 0}, "alpha is 0; it must be greater than 0"),
        ("dirichlet", 4, {"alhpa": 1.0}, "alhpa"),
        ("dirichlett", 4, {}, "did you mean 'dirichlet'"),
        ("shards", 4, {"shards_per_client": 0}, "shards_per_client is 0"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(name, clients, options, words):
    with pytest.raises(ValueError, match=words):
        split(table(np.arange(40) % 4), name, clients, 0, **options)


def test_a_partition_of_a_users_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def halves(dataset, clients, seed, first=1):\n    n = len(dataset.train[0])\n"
                    "    return [range(first), range(first, n)]\n")  # fmt: skip
    parts = split(table(torch.zeros(5)), f"{file}:halves", 2, first=2)
    assert [p.tolist() for p in parts.values()] == [[0, 1], [2, 3, 4]]


def test_partitioners_of_flwr_datasets():
    pytest.importorskip("flwr_datasets")
    dataset = table(np.arange(550) % 10, torch.arange(550) % 7)
    sizes = [len(p) for p in split(dataset, "flwr", 10).values()]
    assert max(abs(size - 10 * i) for i, size in enumerate(sizes, 1)) <= 5  # they rise by steps
    chosen = {"partitioner": "DirichletPartitioner", "options": {"alpha": 0.5}}
    first, again = (split(dataset, "flwr", 5, 3, **chosen) for _ in range(2))
    assert all(torch.equal(first[c], again[c]) for c in range(5))
    owners = {"partitioner": "NaturalIdPartitioner", "options": {"partition_by": "owner"}}
    ours = split(dataset, "natural", 7)
    assert all(torch.equal(part, ours[c]) for c, part in split(dataset, "flwr", 7, **owners).items())
    with pytest.raises(ValueError, match="did you mean 'SquarePartitioner'"):
        split(dataset, "flwr", 5, partitioner="SquarPartitioner")
    with pytest.raises(ValueError, match=r"DirichletPartitioner: .*alpha"):
        split(dataset, "flwr", 5, partitioner="DirichletPartitioner")


def test_proportions_have_the_moments_of_a_dirichlet_draw() -> None:
    """Mean a / A and variance a (A - a) / (A^2 (A + 1)), A the sum; no alpha is too small."""
    a, rng = np.array([0.5, 1.0, 3.0]), np.random.RandomState(0)
    x, total = np.stack([_proportions(rng, a) for _ in range(20_000)]), a.sum()
    np.testing.assert_allclose(x.mean(0), a / total, atol=0.004)
    np.testing.assert_allclose(x.var(0), a * (total - a) / (total**2 * (total + 1)), atol=0.001)
    assert _proportions(rng, np.full(4, 1e-12)).sum() == 1
