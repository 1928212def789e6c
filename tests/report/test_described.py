"""Figures described in a file: what is drawn is what the runs have, at the load, round or link that the file says."""

import json
from pathlib import Path

import numpy as np
import pytest
from reported import rows, write

from lilliput.cli import main as lilliput
from lilliput.core.fleet import Profile
from lilliput.report import ablations, plots
from lilliput.report.figures import Described, described, setting, value
from lilliput.report.runs import read

ROOT = Path(__file__).parents[2]


def entry(call=1, client=0, down=0, up=0, flops=0.0, evaluation=False, kind="cut"):
    return {
        "call": call, "client": client, "handler": kind, "down": {"params": down}, "down_overhead": 0, "up": {kind: up},
        "up_overhead": 0, "flops": flops, "evaluation": evaluation,
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """Two methods over two alphas and two seeds; FSL-SAGE is better by 0.1 and sends half."""
    for method, gain, up in (("fsl_sage", 0.1, 10**9), ("cse_fsl", 0.0, 2 * 10**9)):
        for alpha in (1, 10000):
            for seed in (0, 1):
                own = {"algorithm": method, "partition": "dirichlet_equal", "dirichlet_equal": {"alpha": alpha}}
                accuracy = [0.5 + gain, 0.6 + gain + 0.02 * seed, 0.55 + gain]
                folder = tmp_path / "runs" / f"{method}-{alpha}-{seed}"
                write(folder, rows(accuracy, up=up, down=0), {**own, "seed": seed})
                calls = [entry(up=10**6, flops=1e9), entry(2, up=2, kind="auxiliary")]
                lines = [{"round": number, "calls": calls} for number in (1, 2, 3)]
                (folder / "ledger.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "runs"


def test_values_are_taken_at_equal_load_or_round(runs):
    run = read(runs / "fsl_sage-1-0")
    at = ("best", "final", {"gb": 1}, {"mb": 2999}, {"rounds": 2}, {"gb": 0.5})
    taken = [value(run, "accuracy", most) for most in at]
    assert taken == [pytest.approx(x) for x in (0.7, 0.65, 0.6, 0.7, 0.7)] + [None]


def test_settings_are_found_by_key_by_axis_and_in_the_ledger(runs):
    run = read(runs / "cse_fsl-1-0")
    keys = ("dirichlet_equal.alpha", "partition.alpha", "mb.cut", "mb.auxiliary", "partition.nothing")
    assert [setting(run, key) for key in keys] == [1, 1, 1.0, 2e-6, None]


def test_a_metric_against_a_setting_is_a_mean_over_seeds(runs, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, stem: drawn.setdefault(stem.name, figure) and [])
    figure = Described("alpha", "setting", [str(runs)], x="partition.alpha", at={"gb": 2}, labels={"fsl_sage": "SAGE"})
    figure.draw(tmp_path)
    (ax,) = drawn["alpha"].axes
    sage = next(line for line in ax.containers if line.get_label() == "SAGE").lines[0]
    assert sage.get_xydata() == pytest.approx(np.array([(1, 0.71), (10000, 0.71)]))  # 0.70, 0.72 within 2 GB
    cse = next(line for line in ax.containers if line.get_label() == "cse_fsl").lines[0]
    assert cse.get_ydata() == pytest.approx([0.5, 0.5]) and ax.get_xscale() == "log"


def test_a_call_waits_for_its_slowest_and_links_count_bits():
    link = Profile(up_bps=20e6, down_bps=20e6, flops=1e9)
    entries = [entry(1, 0, up=20_000_000), entry(1, 1, up=10_000_000, flops=1e9), entry(2, 0, down=5_000_000)]
    # 20 MB are 160 Mbit: 8 s at 20 Mbit/s, and not the 1 s of 20 MB/s; the other client took 4 + 1.
    line = ablations._whole({"round": 1, "calls": entries})
    assert ablations.simulated(line, link) == (8.0 + 2.0, 0.0)


def test_latency_is_per_round_or_to_the_target(runs, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ablations, "latency", lambda bars, title, width: seen.append(bars))
    monkeypatch.setattr(plots, "save", lambda figure, stem: [])
    links = {"8 Mbit/s": {"up_bps": "8e6", "down_bps": 8e6, "flops": 1e9}}
    for target in (None, 0.65):
        Described("l", "latency", [str(runs)], target=target, metric="accuracy", links=links).draw(tmp_path)
    per_round, to_target = seen
    assert per_round["cse_fsl"]["8 Mbit/s"] == pytest.approx((1.0, 1.0), rel=1e-5)
    assert to_target["fsl_sage"]["8 Mbit/s"] == pytest.approx((2.0, 2.0), rel=1e-5) and "cse_fsl" not in to_target


def test_the_example_draws_from_the_command_line(tmp_path, runs, capsys):
    for number, alpha in enumerate((1, 10000)):  # the example's other figures are of an even partition
        for method in ("fsl_sage", "cse_fsl"):
            folder = runs / f"{method}-{alpha}-0"
            own = {"algorithm": method, "partition": "iid", "seed": number, "fsl_sage": {"align_interval": 5 + number}}
            new = write(runs / f"{method}-iid-{number}", rows([0.7, 0.82], loss=1.0), own)
            (new / "ledger.jsonl").write_text((folder / "ledger.jsonl").read_text())
    out = tmp_path / "figures"
    assert lilliput(["compare", str(runs), "--figure", str(ROOT / "docs" / "figures.yaml"), "--figures", str(out)]) == 0
    names = [figure.name for figure in described(ROOT / "docs" / "figures.yaml")]
    assert {path.stem for path in out.iterdir()} == set(names)
    assert "FSL-SAGE" in (out / "best_and_final.tex").read_text() and capsys.readouterr().out.count("figures/") == 16


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("runs: runs", "describes no figures"),
        ("figures: {a: {kinds: curves}}", "figure a has no 'kinds'; did you mean 'kind'"),
        ("figures: {a: {kind: bars}}", "kind is 'bars'; choose one of curves, setting"),
        ("figures: {a: {against: bytes}}", "against is 'bytes'; choose one of rounds, mb, gb"),
        ("figures: {a: {kind: setting}}", "kind setting needs x"),
        ("figures: {a: {at: {bytes: 3}}}", "'bytes'"),
        ("figures: [", "not YAML"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, text, answer):
    path = tmp_path / "figures.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=answer) as refused:
        described(path)
    assert "\n" not in str(refused.value)


def test_figures_without_runs_are_refused(runs, tmp_path):
    for figure, answer in (
        (Described("a", runs=[str(runs)], where={"algorithm": "fedavg"}), "no run has {'algorithm': 'fedavg'}"),
        (Described("a", "setting", [str(runs)], x="fsl_sage.l"), "no run has a number for fsl_sage.l"),
        (Described("a", "latency", [str(runs)], target="accuracy>=0.9", links={"x": {}}), "no run reached"),
    ):
        with pytest.raises(ValueError, match=answer):
            figure.draw(tmp_path)
