"""What the clients hold is the data set, cut as asked."""

import pickle
import subprocess
import sys

import pytest
import torch

from lilliput import data
from lilliput.data import Dataset, federate


@pytest.fixture
def table():
    x = torch.arange(60, dtype=torch.float32)[:, None]
    return Dataset("table", (x, torch.arange(60) % 3), (x[:7] + 100, torch.arange(7) % 3), 3)


def held(batches):
    return torch.cat([batch[0] for batch in batches.epoch(None)]).flatten().long()


def test_clients_hold_what_the_partition_says(table):
    f = federate(table, "dirichlet", clients=4, batch_size=8, alpha=0.5)
    assert all(torch.equal(held(f.train[c]), index) for c, index in f.partition.items())
    assert all(len(f.train[c]) == -(-len(index) // 8) for c, index in f.partition.items())
    assert torch.equal(held(f.test), torch.arange(100, 107)) and f.client_test is None


def test_a_test_fraction_is_each_clients_own_and_not_trained_on(table):
    f = federate(table, "iid", clients=4, test_fraction=0.2)
    for c, index in f.partition.items():
        train, test = held(f.train[c]), held(f.client_test[c])
        assert len(test) == 3 and torch.equal(torch.cat([train, test]).sort().values, index)
    # One example each: it is trained on.
    assert federate(table, "iid", clients=60, test_fraction=0.5).client_test is None


@pytest.mark.parametrize(("classes", "rows"), [(100, 32), (1 << 20, 8), (1 << 24, 1)])
def test_texts_are_evaluated_so_few_at_a_time_that_their_logits_fit(classes, rows):
    columns = torch.zeros(40, 17, dtype=torch.int32), torch.tensor([[1, 17]]).expand(40, 2)
    f = federate(Dataset("texts", columns, columns, classes, (16,), "tokens"), "iid", clients=2)
    assert len(next(iter(f.test.epoch(None)))["labels"]) == rows


def test_natural_clients_have_their_own_test_examples(table):
    owners, test_owners = torch.arange(60) % 3, torch.tensor([0, 0, 0, 2, 2, 2, 2])
    owned = Dataset("t", table.train, table.test, 3, owners=owners, test_owners=test_owners)
    f = federate(owned, "auto")
    assert len(f.train) == 3 and sorted(f.client_test) == [0, 2]  # owner 1 has nothing to test on
    assert held(f.client_test[0]).tolist() == [100, 101, 102]
    assert federate(owned, "iid", clients=3).client_test is None
    pairs = federate(owned, "natural", clients=2)
    assert sum(b.examples for b in pairs.client_test.values()) == 7


def test_what_decides_the_data_decides_the_fingerprint(table):
    first = federate(table, "iid", clients=4)
    assert federate(table, "iid", clients=4, batch_size=3).fingerprint == first.fingerprint
    others = [federate(table, "iid", clients=5), federate(table, "iid", clients=4, seed=1)]
    others += [federate(table, "iid", clients=4, test_fraction=0.2)]
    changed = Dataset("table", (table.train[0] + 1, table.train[1]), table.test, 3)
    assert changed.fingerprint() != table.fingerprint()
    others += [federate(changed, "iid", clients=4)]
    assert len({first.fingerprint, *(f.fingerprint for f in others)}) == 5


def test_clients_travel_to_a_spawned_worker():
    f = federate(data.load("digits"), clients=3)
    there = list(pickle.loads(pickle.dumps(f.train[1])).epoch(None))
    for (x, y), (u, v) in zip(f.train[1].epoch(None), there, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
        ({"augment": "flip"}, "augment='flip' is for images"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"alpha": 1.0}, "alpha"),
    ],
)
def test_bad_settings_are_refused(table, options, words):
    with pytest.raises(ValueError, match=words):
        federate(table, clients=3, **options)


def test_a_data_set_says_what_is_wrong_with_it():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="4, 3 rows"):
        Dataset("d", (x, torch.zeros(3)), (x, torch.zeros(4)), 2)
    with pytest.raises(ValueError, match="3 owners for 4 examples"):
        Dataset("d", (x, torch.zeros(4)), (x, torch.zeros(4)), 2, owners=torch.zeros(3))
    with pytest.raises(ValueError, match="kind 'sound' is not one of"):
        Dataset("d", (x, torch.zeros(4)), (x, torch.zeros(4)), 2, kind="sound")


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (
            (torch.zeros(2, 3), torch.tensor([0, 2])),
            (torch.zeros(1, 3), torch.tensor([0])),
            "labels go from 0 to 2; 2 classes",
        ),
        ((torch.zeros(2, 3), torch.tensor([0, 1])), (torch.zeros(1, 3), torch.tensor([-1])), "labels go from -1 to -1"),
        ((torch.zeros(2, 3), torch.tensor([0, 1])), (), "train has 2 columns and test 0"),
        ((torch.zeros(2, 1, 3, 3), torch.tensor([0, 1])), (torch.zeros(1, 1, 3, 3),), "train has 2 columns and test 1"),
    ],
)
def test_labels_and_columns_that_do_not_fit_are_refused(train, test, words):
    with pytest.raises(ValueError, match=words):
        Dataset("d", train, test, 2)


def test_images_have_channels_rows_and_columns():
    x, y = torch.zeros(2, 5, 5, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"images are \(N, C, H, W\), not \(2, 5, 5\)"):
        Dataset("d", (x, y), (x, y), 2, kind="image")


def test_names_and_a_users_own(tmp_path):
    assert {"digits", "stdlib"} <= set(data.names())
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        data.load("digit")
    with pytest.raises(ValueError, match="no_such_option"):
        data.load("digits", no_such_option=1)
    file = tmp_path / "mine.py"
    file.write_text("import torch\nfrom lilliput.data import Dataset\n"
                    "def mine(n=4):\n    xy = torch.zeros(n, 2), torch.zeros(n).long()\n"
                    "    return Dataset('mine', xy, xy, 2)\n"
                    "HERE = mine(3)\ndef wrong():\n    return 1\n")  # fmt: skip
    assert len(data.load(f"{file}:mine", n=6).train[0]) == 6
    assert len(data.load(f"{file}:HERE").train[0]) == 3 and data.load(f"{file}:HERE").kind == "tabular"
    with pytest.raises(ValueError, match="made a int"):
        data.load(f"{file}:wrong")


def test_importing_data_loads_nothing_heavy():
    heavy = "sklearn datasets pyarrow PIL matplotlib flwr_datasets"
    code = f"import sys, lilliput.data; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
