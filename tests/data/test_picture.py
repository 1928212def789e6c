"""The picture of a partition draws what the partition says."""

import dataclasses

import pytest
import torch

from lilliput.data import Dataset, federate
from lilliput.data.partition import PARTITIONS
from lilliput.data.picture import class_counts, picture


def labelled(*labels, **about):
    """A data set of these labels, with images of one pixel."""
    y = torch.tensor(labels)
    x = torch.zeros(len(y), 1, 1, 1, dtype=torch.uint8)
    return Dataset("dots", (x, y), (x[:1], y[:1]), classes=4, **about)


def mixed(examples=400):
    return labelled(*torch.randint(4, (examples,), generator=torch.Generator().manual_seed(0)).tolist())


def test_counts_are_those_of_the_partition():
    data = labelled(0, 0, 1, 3, 3, 3)
    parts = {7: torch.tensor([0, 3, 5]), 2: torch.tensor([1, 2, 4])}
    assert class_counts(data, parts).tolist() == [[1, 1, 0, 1], [1, 0, 0, 2]]  # client 2, then 7


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "pathological"])
def test_counts_add_up_to_sizes_and_classes(partition):
    assert partition in PARTITIONS
    data = mixed()
    parts = federate(data, partition, clients=8).partition
    counts = class_counts(data, parts)
    assert counts.sum(1).tolist() == [len(parts[c]) for c in sorted(parts)]
    assert counts.sum(0).tolist() == data.train[1].bincount(minlength=4).tolist()


def test_each_dot_is_a_class_on_a_client_and_its_area_the_count():
    data = labelled(0, 0, 0, 1, 2, 2)
    figure = picture(data, {0: torch.tensor([0, 1, 3]), 1: torch.tensor([2, 4, 5])})
    bars, dots = figure.axes
    assert [bar.get_height() for bar in bars.patches] == [3, 3]
    drawn = dots.collections[0]
    assert drawn.get_offsets().tolist() == [[0, 0], [0, 1], [1, 0], [1, 2]]
    areas = drawn.get_sizes()
    assert (areas / areas.max()).tolist() == pytest.approx([1, 1 / 2, 1 / 2, 1])
    assert drawn.get_array().tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3, 2 / 3])  # shares of the client's data


@pytest.mark.parametrize("clients", [1, 2, 10, 37, 100])
def test_all_that_is_drawn_lies_on_the_page(clients):
    data = dataclasses.replace(mixed(), name="shakespeare_roles")
    figure = picture(data, federate(data, "iid", clients=clients).partition)
    figure.canvas.draw()
    page, drawn = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert page.x0 <= drawn.x0 and page.y0 <= drawn.y0 and drawn.x1 <= page.x1 and drawn.y1 <= page.y1
    assert len(figure.axes[-1].get_xticks()) <= 20 and max(figure.get_size_inches()) < 7


def test_owners_are_named_where_each_has_a_client_of_its_own():
    data = labelled(0, 1, 2, owners=torch.tensor([0, 1, 2]), owner_names=("ann", "bob", "cyd"))

    def names(parts):
        figure = picture(data, {c: torch.tensor(index) for c, index in parts.items()})
        return [tick.get_text() for tick in figure.axes[-1].get_xticklabels()]

    assert names({0: [1], 1: [0], 2: [2]}) == ["bob", "ann", "cyd"]
    assert names({0: [1, 2], 1: [0]}) == ["0", "1"]


def test_text_has_sizes_and_no_classes():
    x = torch.zeros(6, 5, dtype=torch.int64)
    data = Dataset("words", (x, x), (x, x), classes=3, kind="text")
    parts = {0: torch.arange(4), 1: torch.tensor([4, 5])}
    assert class_counts(data, parts).tolist() == [[4], [2]]
    (bars,) = picture(data, parts).axes
    assert [bar.get_height() for bar in bars.patches] == [4, 2]


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_it_is_written_in_the_format_of_the_suffix(suffix, start, tmp_path):
    data = mixed(40)
    picture(data, federate(data, clients=4).partition, tmp_path / "new" / f"partition.{suffix}")
    assert (tmp_path / "new" / f"partition.{suffix}").read_bytes().startswith(start)


def test_no_picture_is_written_as_what_is_no_picture(tmp_path):
    data = mixed(40)
    with pytest.raises(ValueError, match=r"'partition\.txt'; choose \.png, \.pdf or \.svg"):
        picture(data, federate(data, clients=4).partition, tmp_path / "partition.txt")
