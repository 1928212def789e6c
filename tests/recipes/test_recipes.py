"""Recipes: that their settings are whole, what their verdicts mean, and that the page made of them is current."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lilliput.cli import main
from lilliput.config import expanded
from lilliput.config.checks import check
from lilliput.recipes import RECIPES, Case, Recipe, Version, find
from lilliput.recipes.markdown import markdown

TABLE = [
    Case("a", {"lr": 0.1}, expected=0.6, tolerance=0.02, published=0.61),
    Case("b", {"lr": 0.2}, expected=0.5, tolerance=0.02, published=0.52),
    Case("c", {"lr": 0.3}, expected=0.4, tolerance=0.02, published=0.43),
]


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ({"a": 0.6, "b": 0.5, "c": 0.4}, "reproduced"),
        ({"a": 0.62, "b": 0.48, "c": 0.42}, "reproduced"),
        ({"a": 0.7, "b": 0.6, "c": 0.5}, "same ordering"),
        ({"a": 0.5, "b": 0.6, "c": 0.4}, "not reproduced"),
        ({"a": 0.6, "b": 0.5, "c": None}, "not run"),
        ({}, "not run"),
    ],
)
def test_a_verdict_compares_every_row(measured: dict[str, float | None], verdict: str) -> None:
    assert Version(TABLE, "a laptop", 1.0).verdict(measured) == verdict


def test_one_row_has_no_ordering_to_keep() -> None:
    version = Version(TABLE[:1], "a laptop", 1.0)
    assert version.verdict({"a": 0.7}) == version.verdict({"a": 0.5}) == "not reproduced"


def test_rows_without_an_expectation_hold_nothing_up() -> None:
    open_row = Case("d", {"lr": 0.4})
    assert Version([*TABLE, open_row], "", 1.0).verdict({"a": 0.6, "b": 0.5, "c": 0.4, "d": 0.9}) == "reproduced"
    assert Version([*TABLE, open_row], "", 1.0).verdict({"a": 0.7, "b": 0.6, "c": 0.5, "d": 0.1}) == "same ordering"
    assert Version([open_row], "", 1.0).verdict({"d": 0.9}) == "nothing to compare with"
    assert Version([open_row], "", 1.0).verdict({}) == "not run"


def test_the_value_may_be_what_was_sent_until_the_metric_was_reached() -> None:
    rows = [{"round": n, "accuracy": 0.4 + 0.1 * n, "up_bytes": 2**29, "down_bytes": 2**29} for n in (1, 2, 3)]
    values = [Recipe("r", "", "", {}, {}, until=value).value(rows) for value in (0.55, 0.7, 0.9)]
    assert values == [2.0, 3.0, float("inf")] and Recipe("r", "", "", {}, {}, until=0.5).value([{"round": 1}]) is None


def test_a_floor_may_be_exceeded_but_not_missed() -> None:
    version = Version(TABLE[:1], "a laptop", 1.0, floor=True)
    assert version.verdict({"a": 0.9}) == version.verdict({"a": 0.585}) == "reproduced"
    assert version.verdict({"a": 0.57}) == "not reproduced"


FEDERATED = [name for name, recipe in RECIPES.items() if recipe.command == "run"]


@pytest.mark.parametrize("name", FEDERATED)
def test_every_case_of_every_recipe_can_run(name: str) -> None:
    recipe = find(name)
    assert recipe.name == name and "full" in recipe.versions
    for scale, version in recipe.versions.items():
        assert version.hours > 0 and version.hardware
        chosen = expanded({"recipe": name, "scale": scale})
        assert [s["case"] for s in chosen] == [case.name for case in version.cases]
        for s in chosen:
            check(s)
            assert not s.notes, "a recipe sets nothing that does nothing"


def test_a_recipe_spells_out_every_number() -> None:
    """A changed default must not change a recipe."""
    for recipe in map(find, FEDERATED):
        spelt = set(recipe.settings) | set.intersection(*(set(case.settings) for case in recipe.versions["full"].cases))
        assert {"algorithm", "model", "dataset", "partition", "clients", "cohort", "rounds", "seed"} <= spelt
        assert {"batch_size", "lr", "optimizer", "momentum", "weight_decay", "schedule"} <= spelt
        assert {"local_epochs", "local_steps"} & spelt


def test_the_page_of_recipes_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "reproduction.md"
    assert page.read_text(encoding="utf-8") == markdown(), "lilliput list recipes --markdown > docs/reproduction.md"


def test_the_value_is_that_of_the_final_or_the_best_round() -> None:
    rows = [{"round": 1, "accuracy": 0.5, "loss": 1.0}, {"round": 2, "accuracy": 0.4, "loss": 2.0}, {"round": 3}]
    values = {
        (metric, at): Recipe("r", "", "", {}, {}, metric, at).value(rows)  # type: ignore[arg-type]
        for metric in ("accuracy", "loss", "f1")
        for at in ("final", "best")
    }
    assert values[("accuracy", "final")] == 0.4 and values[("accuracy", "best")] == 0.5
    assert values[("loss", "best")] == 1.0 and values[("f1", "final")] is None


def test_unknown_recipes_scales_and_cases_are_refused() -> None:
    for words, answer in (
        ({"recipe": "fedavg/cifar10"}, "did you mean 'fedavg/cifar10_cnn'"),
        ({"recipe": "fedavg/cifar10_cnn", "scale": "tiny"}, "choose full or small"),
        ({"recipe": "fedavg/cifar10_cnn", "case": "FedAv"}, "did you mean 'FedAvg'"),
        ({"recipe": "lilliput.recipes:Case"}, "not a lilliput.recipes.Recipe"),
    ):
        with pytest.raises(ValueError, match=answer):
            expanded(words)


OWN = """
from lilliput.recipes import Case, Recipe, Version

cases = [Case("weak", {{"lr": 0.01}}, {weak}, 0.03), Case("strong", {{"lr": 0.3}}, {strong}, 0.03)]
tiny = Version([cases[0]], "any", 0.1, {{"rounds": 1}}, floor=True)
OWN = Recipe(
    "own", "Two rates", "nowhere", {{"dataset": "digits", "clients": 4, "rounds": 3, "plots": False}},
    {{"full": Version(cases, "any", 0.1), "tiny": tiny}},
)
"""


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., tuple[int, str]]:
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str]:
        status = main(["run", "--plain", "recipe=own_recipe.py:OWN", "tensorboard=false", *words])
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


def test_a_recipe_runs_what_is_missing_and_says_what_came_of_it(tmp_path: Path, run: Callable) -> None:
    (tmp_path / "own_recipe.py").write_text(OWN.format(weak=0.0, strong=1.0))
    status, said = run("case=weak")
    assert status == 0 and "weak: accuracy" in said and len(list(tmp_path.rglob("config.yaml"))) == 1
    status, said = run("--check")
    assert "weak: finished before" in said and len(list(tmp_path.rglob("config.yaml"))) == 2
    # It expects the impossible, but the larger rate learns more in three rounds.
    assert (status, said.splitlines()[-1]) == (0, "own (full): same ordering")
    assert "strong: accuracy 0." in said and "expected 1 ± 0.03" in said


def test_a_recipe_that_is_not_reproduced_ends_with_status_one(tmp_path: Path, run: Callable) -> None:
    (tmp_path / "own_recipe.py").write_text(OWN.format(weak=1.0, strong=0.0))
    status, said = run("--check")
    assert (status, said.splitlines()[-1]) == (1, "own (full): not reproduced")


def test_a_scale_is_a_version_of_its_own(tmp_path: Path, run: Callable) -> None:
    (tmp_path / "own_recipe.py").write_text(OWN.format(weak=0.0, strong=1.0))
    status, said = run("scale=tiny", "--check")
    assert (status, said.splitlines()[-1]) == (0, "own (tiny): reproduced")


def test_a_changed_recipe_is_not_held_against_its_source(tmp_path: Path, run: Callable) -> None:
    (tmp_path / "own_recipe.py").write_text(OWN.format(weak=0.0, strong=1.0))
    status, said = run("--check", "clients=5")
    assert status == 2 and "clients=5 is not the recipe's 4" in said
    assert run("--check", "engine=sequential", "case=weak")[1].splitlines()[-1] == "own (full): not run"


def test_a_recipe_can_be_swept(tmp_path: Path, run: Callable) -> None:
    pytest.importorskip("hydra")
    (tmp_path / "own_recipe.py").write_text(OWN.format(weak=0.0, strong=1.0))
    status, said = run("-m", "seed=0,1")
    assert status == 0 and said.splitlines()[-1] == "4 ran"
