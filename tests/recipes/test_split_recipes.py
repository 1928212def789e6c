"""FSL-SAGE's comparison: bytes at full size, foretold without training, and one round of everything at small scale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lilliput import data
from lilliput.cli import main
from lilliput.config import expanded
from lilliput.config.build import build
from lilliput.data import Dataset
from lilliput.engines.dry import predict
from lilliput.recipes import RECIPES
from lilliput.recipes.recipe import Case, Recipe
from lilliput.recipes.splitting import DIRICHLET, IID, SPLIT


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR as far as its shapes and its number of classes go."""

    def load(name: str, **_: object) -> Dataset:
        classes = {"cifar10": 10, "cifar100": 100}[name]
        image, one = torch.zeros(1, 3, 32, 32, dtype=torch.uint8), (0.5,) * 3
        train, test = ((image.expand(n, -1, -1, -1), torch.arange(n) % classes) for n in (50_000, 10_000))
        return Dataset(name, train, test, classes, mean=one, std=one)

    monkeypatch.setattr(data, "load", load)


def mebibytes(recipe: Recipe, case: Case, **more: str) -> float:
    """A round's mean, of one in which the heads are aligned and the rest of its interval."""
    (s,) = expanded({"recipe": recipe.name, "case": case.name, **more})
    aligned, other = (cost.count("published") for cost in predict(build(s).experiment, 2).rounds)
    interval = s.node("algorithm").get("align_interval", 1)
    return (aligned + (interval - 1) * other) / interval / 2**20


def of_method(*names: str) -> Iterator[tuple[Recipe, Case]]:
    for recipe in SPLIT:
        yield from ((recipe, case) for case in recipe.versions["full"].cases if case.name in names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "case"),
    [*of_method("FedAvg", "CSE-FSL", "FSL-SAGE"), *[pair for pair in of_method("SplitFed v1") if "18" in pair[0].name]],
    ids=lambda x: x.name,
)
def test_bytes_per_round_at_full_size(cifar: None, recipe: Recipe, case: Case) -> None:
    assert mebibytes(recipe, case) == pytest.approx(case.mib, abs=0.006)


@pytest.mark.slow
def test_fsl_sage_sends_a_sixth_of_splitfed_and_with_codecs_a_sixteenth(cifar: None) -> None:
    recipe = RECIPES["split/resnet18_cifar10_iid"]
    splitfed, sage = (
        {case.name: case for case in recipe.versions["full"].cases}[n] for n in ("SplitFed v1", "FSL-SAGE")
    )
    assert sage.mib / splitfed.mib == pytest.approx(0.168, abs=5e-4)
    coded = mebibytes(recipe, sage, codec="int8:activations+bf16")
    # Models and heads by half, activations by four and their blocks' ranges, in MiB.
    assert coded == pytest.approx((52.26 + 8.03) / 2 + 80 / 4 * (1 + 8 / 512), abs=0.02)
    assert coded / splitfed.mib == pytest.approx(0.06, abs=1e-3)


def test_the_published_bytes_are_expected() -> None:
    by_name = {case.name: case.mib for case in RECIPES["split/resnet18_cifar10_iid"].versions["full"].cases}
    assert list(by_name.values()) == [853.83, 833.51, 833.51, 292.85, 140.29]


def test_every_network_data_set_and_mixture_is_there() -> None:
    names = {(recipe.settings["model"], recipe.settings["dataset"]) for recipe in SPLIT}
    assert len(names) == 8
    for recipe in SPLIT:
        cases = recipe.versions["full"].cases
        assert {case.settings["partition"] for case in cases} <= {"iid", "dirichlet_equal"}
        assert len(cases) % 5 == 0 and all(case.mib for case in cases)
    published = [case for recipe in SPLIT for case in recipe.versions["full"].cases if case.published]
    assert len(published) == len(IID) + 4 * len(DIRICHLET)


def test_fedavg_is_expected_to_be_splitfeds_equal_and_not_what_was_published() -> None:
    cases = {case.name: case for case in RECIPES["split/resnet18_cifar10_dirichlet"].versions["full"].cases}
    for alpha in (1, 10, 100, 10_000):
        assert cases[f"FedAvg, alpha {alpha}"].expected == cases[f"SplitFed v1, alpha {alpha}"].published


@pytest.mark.parametrize(
    "name",
    [
        recipe.name
        if recipe.name == "split/resnet18_cifar10_iid"
        else pytest.param(recipe.name, marks=pytest.mark.slow)
        for recipe in SPLIT
    ],
)
def test_one_round_at_small_scale(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", f"recipe={name}", "scale=small", "--check", "--plain", "tensorboard=false", "plots=false"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == f"{name} (small): nothing to compare with"
    assert len(list(tmp_path.rglob("metrics.jsonl"))) == 5
