import csv
import io
from statistics import stdev

import pytest
from reported import rows, write
from rich.console import Console

from lilliput.report.compare import compare


def column(comparison, key):
    """A column's cells by the label of their group."""
    (found,) = (column for column in comparison.columns if column.key == key)
    return dict(zip((group.label for group in comparison.groups), comparison.cells(found), strict=True))


@pytest.fixture
def runs(tmp_path):
    """Two methods, three seeds each; FedProx sends twice as much.  Seed s ends 0.01 s higher."""
    for name, up in (("fedavg", 1_000_000), ("fedprox", 2_000_000)):
        for seed in range(3):
            accuracies = [0.2, 0.8 + seed / 100, 0.7 + seed / 100]
            config = {"algorithm": name, "seed": seed, "lr": 0.1, "engine": f"workers({seed})"}
            made = rows(accuracies, up=up, down=0, peak_memory_bytes=5_000_000 + seed)
            write(tmp_path / name / str(seed), made, config)
    return tmp_path


def test_runs_that_differ_in_the_seed_alone_are_one_group(runs):
    comparison = compare([runs])
    assert [(group.label, len(group.runs)) for group in comparison.groups] == [("fedavg", 3), ("fedprox", 3)]
    assert comparison.metric == "accuracy" and comparison.notes == ()


def test_mean_and_sample_deviation_over_seeds(runs):
    comparison = compare([runs])
    final = column(comparison, "final")["fedavg"]
    assert final.mean == pytest.approx((0.70 + 0.71 + 0.72) / 3) and final.count == 3
    assert final.std == pytest.approx(stdev([0.70, 0.71, 0.72])) == pytest.approx(0.01)
    assert column(comparison, "best")["fedavg"].mean == pytest.approx(0.81)
    assert column(comparison, "peak_memory_bytes")["fedavg"].mean == pytest.approx(5_000_001)
    assert column(comparison, "up_bytes")["fedprox"].mean == 3 * 2_000_000
    assert "down_bytes" not in {c.key for c in comparison.columns}  # nothing was sent down


def test_what_a_target_cost(runs):
    comparison = compare([runs], target="accuracy>=0.81")
    assert column(comparison, "rounds_to")["fedavg"].mean == 2
    assert column(comparison, "rounds_to")["fedavg"].count == 2  # seed 0 stops at 0.80
    assert column(comparison, "mb_to")["fedprox"].mean == pytest.approx(2 * 2.0)
    assert column(comparison, "seconds_to")["fedavg"].mean == pytest.approx(20.0)
    never = compare([runs], target=0.99)
    assert column(never, "rounds_to") == {"fedavg": None, "fedprox": None}


def test_a_loss_is_better_when_lower(tmp_path):
    made = [{"round": n, "loss": loss} for n, loss in enumerate([3.0, 1.0, 2.0])]
    write(tmp_path / "a", made, {"algorithm": "fedavg", "seed": 0})
    comparison = compare([tmp_path], target=1.5)
    assert comparison.metric == "loss" and not comparison.target.at_least
    assert column(comparison, "best")["fedavg"].mean == 1.0
    assert column(comparison, "rounds_to")["fedavg"].mean == 1


def test_groups_are_named_by_what_differs(tmp_path):
    for mu in (0.1, 1.0):
        config = {"algorithm": "fedprox", "fedprox": {"mu": mu}, "lr": 0.1, "seed": 0}
        write(tmp_path / str(mu), rows([0.5]), config)
    assert [group.label for group in compare([tmp_path]).groups] == ["mu 0.1", "mu 1.0"]


def test_a_setting_of_one_method_alone_is_not_in_its_name(tmp_path):
    """And the engine, with settings of its own, makes no group."""
    own = {"a": {"algorithm": "fedavg"}, "b": {"algorithm": "fedprox", "fedprox": {"mu": 0.1}}}
    own["c"] = {"algorithm": "fedprox", "fedprox": {"mu": 1.0}}
    own["d"] = own["a"] | {"engine": "workers", "workers": {"workers": 2}, "seed": 1}
    for name, config in own.items():
        write(tmp_path / name, rows([0.5]), {"engine": "sequential", "seed": 0, **config})
    assert [g.label for g in compare([tmp_path]).groups] == ["fedavg", "fedprox, mu 0.1", "fedprox, mu 1.0"]
    assert [g.label for g in compare([tmp_path / "a", tmp_path / "b"]).groups] == ["fedavg", "fedprox"]


def test_groups_that_would_have_one_name_get_all_that_differs(tmp_path):
    for name, config in (("a", {"lr": 0.1}), ("b", {"lr": 0.1, "server_lr": 1.0})):
        write(tmp_path / name, rows([0.5]), config)
    assert [g.label for g in compare([tmp_path]).groups] == ["all runs", "server_lr 1.0"]


def test_groups_by_named_settings_say_what_else_they_mix(runs):
    comparison = compare([runs], by=["lr"])
    (group,) = comparison.groups
    assert group.label == "lr 0.1" and len(group.runs) == 6
    assert comparison.notes == ("the runs of 'lr 0.1' differ in algorithm: their spread is not only over seeds",)
    with pytest.raises(ValueError, match=r"no run has a setting 'rank'.*algorithm, lr"):
        compare([runs], by=["rank"])


def test_the_same_seed_twice_is_one_sample(runs):
    write(runs / "fedavg" / "again", rows([0.9]), {"algorithm": "fedavg", "seed": 1, "lr": 0.1})
    comparison = compare([runs])
    assert len(comparison.groups[0].runs) == 3
    assert column(comparison, "final")["fedavg"].mean == pytest.approx((0.70 + 0.9 + 0.72) / 3)
    assert any("same seed" in note for note in comparison.notes)
    assert any("ended after different rounds: 1, 3" in note for note in comparison.notes)


def test_runs_on_other_data_are_refused_and_other_partitions_are_not(runs):
    assert len({run.environment["partition"] for group in compare([runs]).groups for run in group.runs}) == 3
    write(runs / "other", rows([0.5]), {"algorithm": "fedavg", "seed": 0}, data="e")
    with pytest.raises(ValueError, match=r"other .*differ; compare runs on the same data"):
        compare([runs])


def test_runs_without_a_common_metric_are_refused(tmp_path):
    write(tmp_path / "a", [{"round": 1, "accuracy": 0.5}], {"seed": 0})
    write(tmp_path / "b", [{"round": 1, "loss": 0.5}], {"seed": 0})
    with pytest.raises(ValueError, match="no metric was evaluated by all"):
        compare([tmp_path])


def test_the_console_shows_every_group_and_column_at_any_width(runs):
    for width in (60, 80, 200):
        console = Console(width=width, record=True, file=io.StringIO())
        compare([runs], target="accuracy>=0.81").console(console)
        text = console.export_text()
        assert "71.0 ± 1.0" in text and "2 (2/3)" in text and "…" not in text
        assert all(word in text for word in ("fedavg", "fedprox", "final", "client MB", "seconds"))


def test_latex_is_a_booktabs_table_with_the_best_bold(runs):
    text = compare([runs]).latex()
    assert text.count(r"\\") == 1 + 2 and r"\toprule" in text and r"\bottomrule" in text
    assert r"fedavg & 71.0 $\pm$ 1.0 & 81.0 $\pm$ 1.0" in text  # both methods score the same: no best
    assert r"\textbf{3}" in text and r"\textbf{6}" not in text  # MB up: 3 rounds of 1 MB beat 3 of 2 MB
    assert r"final \%" in text


def test_latex_escapes_what_a_setting_may_hold(tmp_path):
    for name in ("my_net", "50%&#{}"):
        write(tmp_path / name[:2], rows([0.5]), {"model": name, "seed": 0})
    text = compare([tmp_path]).latex()
    assert r"my\_net &" in text and r"50\%\&\#\{\} &" in text


def test_csv_holds_every_number_in_full(runs):
    comparison = compare([runs], target="accuracy>=0.81")
    first, second = csv.DictReader(io.StringIO(comparison.csv()))
    assert first["label"] == "fedavg" and second["algorithm"] == "fedprox" and first["seeds"] == "3"
    assert float(first["final_accuracy"]) == pytest.approx(0.71) and float(
        first["final_accuracy_std"]
    ) == pytest.approx(0.01)
    assert (first["rounds_to"], first["rounds_to_runs"]) == ("2.0", "2")
    assert float(second["up_bytes"]) == 6_000_000


def test_a_single_run_gets_one_figure(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    compare([runs / "fedavg" / "0"]).figures(folder)
    assert {path.name for path in folder.iterdir()} == {"accuracy.pdf", "accuracy.png"}


def test_figures_are_written_as_vectors_and_pixels(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    written = compare([runs], target="accuracy>=0.81").figures(folder)
    stems = {"accuracy", "accuracy_rounds", "accuracy_mb", "accuracy_seconds", "accuracy_memory"}
    assert {path.name for path in written} == {f"{stem}.{kind}" for stem in stems for kind in ("pdf", "png")}
    assert all(path.read_bytes().startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG") for path in written)
