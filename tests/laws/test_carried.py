"""Of whatever type a parameter or buffer is, a method carries it right, or refuses it by name and writes nothing."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from fixtures import METHODS, TAILED, TOYS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lilliput
from lilliput.algorithms import SPLIT
from lilliput.pretraining import Pretrain, network
from lilliput.splitter import Split
from lilliput.tasks import Supervised
from lilliput.wire.header import CODES

DTYPES = [*CODES, torch.complex32, torch.complex128]
TRAINED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
AVERAGED = (*TRAINED, torch.complex64, torch.int64, torch.int32)
KINDS = ("trained", "frozen", "buffer", "not carried")
CASES = [(kind, x) for kind in KINDS for x in DTYPES if kind != "trained" or x.is_floating_point or x.is_complex]
NAMES = sorted(METHODS.keys() - TOYS.keys())
# Batches of 4 by client: a mean over clients by examples weighs a change per batch as (1 * 1 + 3 * 3) / 4 = 2.5.
BATCHES = {0: 1, 1: 3}


class Odd(nn.Module):
    """A linear layer, scaled by a tensor of a type that is drawn; a buffer may count the forwards in training."""

    def __init__(self, kind: str, dtype: torch.dtype, counts: bool):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.counts = nn.Linear(6, 8), counts
        x = (torch.ones(8) / (16 if kind == "trained" else 1)).to(dtype)  # small, so that bfloat16 shows a step
        if kind in ("trained", "frozen"):
            self.odd: Any = nn.Parameter(x, requires_grad=kind == "trained")
        else:
            self.register_buffer("odd", x, persistent=kind == "buffer")

    def forward(self, x: Tensor) -> Tensor:
        if self.counts and self.training:
            self.odd += 1
        scale = self.odd.to(torch.complex64).real if self.odd.is_complex() else self.odd.float()
        return self.linear(x) * (scale / scale.detach().sum())


def data() -> dict[int, list[Any]]:
    draw = torch.Generator().manual_seed(3)
    x = {c: torch.randn(4 * n, 6, generator=draw).split(4) for c, n in BATCHES.items()}
    return {c: [(rows, torch.arange(4) % 3) for rows in parts] for c, parts in x.items()}


def experiment(name: str, odd: nn.Module, folder: Path, **given: Any) -> lilliput.Experiment:
    torch.manual_seed(2)
    tail = nn.Linear(8, 3)
    if name in TAILED:
        task: Supervised = Split(odd, nn.Sequential(nn.ReLU()), tail=tail)
    else:
        whole = Split(odd, nn.Sequential(nn.ReLU(), tail), nn.Linear(8, 3))
        task = whole if name in SPLIT else Supervised(whole.model)
    return lilliput.Experiment(METHODS[name](lr=0.05, **given), task, data(), rounds=2, folder=folder)


def carries(kind: str, dtype: torch.dtype, averages: bool) -> bool:
    """What the rule says: what is frozen or not carried may be anything, what is trained or averaged has a mean."""
    if kind in ("frozen", "not carried"):
        return True
    if kind == "trained":
        return dtype in TRAINED
    if averages:
        return dtype in AVERAGED
    return dtype in CODES and (dtype in AVERAGED or not dtype.is_floating_point)


def check_right(name: str, kind: str, dtype: torch.dtype, history: Any, counts: bool, averages: bool) -> None:
    assert all(row["dropped"] == 0 for row in history.rows)
    models = history.models
    for c, model in models.items():
        held = {**model.params, **(model.buffers or {})}
        odd = next((x for n, x in held.items() if n.endswith("client.odd")), None)
        if odd is None:
            assert kind in ("frozen", "not carried") or not averages
            continue
        assert odd.dtype == dtype
        if kind == "trained":
            assert odd.isfinite().all() and not torch.equal(odd, torch.full((8,), 1 / 16).to(dtype))
        elif averages:
            moves = {"global": 2 * 2.5, 0: 2.0, 1: 6.0}[c] if name != "centralized" else 8.0
            if not (dtype.is_floating_point or dtype.is_complex):
                moves = 2 * int(moves / 2)  # the whole part of each round's mean
            assert torch.equal(odd, torch.full((8,), 1 + counts * moves).to(dtype))


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(NAMES), case=st.sampled_from(CASES), counts=st.booleans(),
    optimizer=st.sampled_from(["sgd", "adam", "adamw", "adamw8bit", "lion"]),
    buffers=st.sampled_from(["average", "local", "none"]),
)  # fmt: skip
def test_every_type_is_carried_right_or_refused_by_name(
    name: str, case: tuple[str, torch.dtype], counts: bool, optimizer: str, buffers: str
) -> None:
    kind, dtype = case
    if name in ("fednova", "scaffold", "fedsub_svd"):  # for SGD, or given momentum
        optimizer = "sgd"
    averages = buffers == "average" or name in ("local_only", "centralized")
    counts = counts and kind == "buffer" and dtype in AVERAGED
    odd = Odd(kind, dtype, counts)
    with TemporaryDirectory() as empty:
        folder = Path(empty) / "run"
        run = experiment(name, odd, folder, optimizer=optimizer, buffers=buffers)
        if carries(kind, dtype, buffers == "average" and name not in ("local_only", "centralized")):
            check_right(name, kind, dtype, run.run("sequential"), counts, averages)
            return
        word = "true or false" if dtype == torch.bool else str(dtype).removeprefix("torch.")
        with pytest.raises(ValueError, match=rf"client\.odd' is {word}"):
            run.run("sequential")
        assert not folder.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_embedding_is_refused_by_name(name: str, tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.words, self.linear = nn.Embedding(5, 8, sparse=sparse), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.words(x[:, 0].gt(0).long()))

    with pytest.raises(ValueError, match=r"client.words.weight' is sparse.*sparse=False"):
        experiment(name, Words(True), tmp_path / "run").run("sequential")
    assert not (tmp_path / "run").exists()
    frozen = Words(True)
    frozen.words.requires_grad_(False)
    for words in (Words(False), frozen):
        rows = experiment(name, words, tmp_path / str(words is frozen)).run("sequential").rows
        assert all(row["dropped"] == 0 for row in rows)


def test_a_sparse_gradient_of_a_users_own_making_names_its_parameter(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Parameter(torch.ones(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.embedding(x[:, 0].gt(0).long(), self.words, sparse=True)

    for more in ({}, {"per_layer": True}, {"accumulate": 2}):
        with pytest.raises(RuntimeError, match=r"gradient of 'client.words' is sparse; make the embedding with"):
            experiment("fedavg", Words(), tmp_path / "run", **more).run("sequential")


class Graph(nn.Module):
    """Outputs are mixed by a sparse matrix, as in a network over a graph."""

    def __init__(self, kind: str, layout: torch.layout = torch.sparse_coo, **given: Any):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        matrix = torch.eye(8).roll(1).to_sparse(layout=layout)
        if kind == "parameter":
            self.graph: Any = nn.Parameter(matrix, **given)
        else:
            self.register_buffer("graph", matrix, **given)

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(self.graph, self.linear(x).T).T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "remedy"), [("parameter", {"requires_grad": False}), ("buffer", {"persistent": False})]
)
def test_a_sparse_matrix_is_refused_by_name_and_its_remedy_trains(
    name: str, kind: str, remedy: dict[str, bool], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{kind} 'client.graph' is sparse \(sparse_coo\)"):
        experiment(name, Graph(kind), tmp_path / "run").run("sequential")
    with pytest.raises(ValueError, match=r"'client.graph' is sparse_csr.*to_sparse_coo"):
        experiment(name, Graph(kind, torch.sparse_csr, **remedy), tmp_path / "run").run("sequential")
    assert not (tmp_path / "run").exists()
    rows = experiment(name, Graph(kind, **remedy), tmp_path / "run").run("sequential").rows
    assert all(row["dropped"] == 0 for row in rows)


def test_what_has_no_values_yet_is_refused_by_name(tmp_path: Path) -> None:
    lazy = nn.Sequential(nn.LazyLinear(8))
    with pytest.raises(ValueError, match=r"'client.0.weight' has no shape yet; run a batch"):
        experiment("fedavg", lazy, tmp_path / "run").run("sequential")
    with pytest.raises(ValueError, match=r"'client.weight' is on the meta device.*engine=dry"):
        experiment("fedavg", nn.Linear(6, 8, device="meta"), tmp_path / "run").run("sequential")
    assert not (tmp_path / "run").exists()


class Language(nn.Module):
    """A language model with a tensor of a type that is drawn."""

    def __init__(self, kind: str, dtype: str, sparse: bool = False):
        super().__init__()
        self.words = nn.Embedding(320, 8, sparse=sparse)
        self.scale = Odd(kind, getattr(torch, dtype), counts=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.words(x) @ self.words.weight.T * self.scale.odd.to(torch.complex64).real.sum()


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_pretraining_carries_every_type_or_refuses_it_by_name(kind: str, dtype: torch.dtype) -> None:
    options = {"kind": kind, "dtype": str(dtype).removeprefix("torch.")}
    setting = Pretrain(model=f"{__file__}:Language", model_options=options, steps=10)
    if carries(kind, dtype, averages=False):
        odd = network.build(setting).scale.odd  # floating weights take the run's type; nothing else is changed
        assert odd.dtype == (torch.float32 if dtype.is_floating_point else dtype)
        return
    with pytest.raises(ValueError, match=rf"'scale\.odd' is {options['dtype']}"):
        network.build(setting)


def test_pretraining_refuses_a_sparse_embedding_by_name() -> None:
    options = {"kind": "frozen", "dtype": "float32", "sparse": True}
    with pytest.raises(ValueError, match=r"'words.weight' is sparse"):
        network.build(Pretrain(model=f"{__file__}:Language", model_options=options, steps=10))
