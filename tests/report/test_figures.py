import numpy as np
import pytest
from reported import rows

from lilliput.report import labels, plots
from lilliput.report.runs import Target


def test_the_mean_curve_of_equal_rounds_is_the_mean_of_the_values():
    x, mean, std = plots.mean_curve([rows([0.1, 0.3]), rows([0.3, 0.7])], "accuracy")
    assert x.tolist() == [1, 2]
    assert mean == pytest.approx([0.2, 0.5])
    assert std == pytest.approx([abs(0.1 - 0.3) / 2**0.5, abs(0.3 - 0.7) / 2**0.5])  # sample deviation of two


def test_seeds_that_spent_different_amounts_are_compared_at_the_same_amount():
    """One seed sends 1 MB a round, the other 2 MB; accuracy grows by 0.1 a round in both."""
    cheap, dear = rows([0.1, 0.2, 0.3, 0.4], up=10**6, down=0), rows([0.1, 0.2, 0.3, 0.4], up=2 * 10**6, down=0)
    x, mean, _ = plots.mean_curve([cheap, dear], "accuracy", "mb")
    assert x.tolist() == [2, 3, 4]  # from where both were evaluated to where one ended
    assert mean == pytest.approx([(0.1 * mb + 0.05 * mb) / 2 for mb in (2, 3, 4)])


def test_one_seed_has_no_band_and_none_no_curve():
    assert not plots.mean_curve([rows([0.1, 0.2])], "accuracy")[2].any()
    assert len(plots.mean_curve([rows([0.1]), rows([None])], "accuracy")[0]) == 0


def test_a_figure_draws_what_the_rows_say():
    groups = {"a": [rows([0.1, 0.3]), rows([0.3, 0.5])], "b": [rows([0.6, 0.8])]}
    figure = plots.curves(groups, "accuracy", ["rounds", "mb"], Target("accuracy", 0.7), width="double")
    panel = figure.axes[1]
    drawn = {line.get_label(): line for line in panel.lines}
    assert drawn["a"].get_xdata() == pytest.approx([5, 10]) and drawn["a"].get_ydata() == pytest.approx([0.2, 0.4])
    marks = [line.get_xydata().tolist() for line in panel.lines if line.get_marker() == "o"]
    assert marks == [[[10, pytest.approx(0.8)]]]  # b reaches the target in round 2; a never does
    assert len(panel.collections) == 1  # a band for the group of two seeds alone
    assert figure.get_figwidth() == plots.WIDTHS["double"]


def test_widely_different_costs_are_drawn_on_a_logarithm():
    groups = {"cheap": [rows([0.1, 0.2], up=10**4, down=0)], "dear": [rows([0.1, 0.2], up=10**6, down=0)]}
    assert plots.curves(groups, "accuracy", ["mb"]).axes[0].get_xscale() == "log"
    assert plots.curves(groups, "accuracy", ["rounds"]).axes[0].get_xscale() == "linear"


def test_memory_against_the_best_value():
    figure = plots.against_memory(
        {"a": [rows([0.5, 0.9, 0.7], peak_memory_bytes=3_000_000)], "unevaluated": [rows([None])]}
    )
    (bars,) = figure.axes[0].containers
    assert bars.lines[0].get_xydata().tolist() == [[3.0, 0.9]]


def test_a_metric_that_nobody_evaluated_is_refused():
    for draw in (plots.curves, plots.against_memory):
        with pytest.raises(ValueError, match="no run evaluated 'f1'"):
            draw({"a": [rows([0.5])]}, "f1")


def test_names_keep_their_order_and_their_distance():
    heights = [0.5, 0.501, 0.9, 0.499]
    ax = plots.curves({str(i): [rows([0.1, y])] for i, y in enumerate(heights)}).axes[0]
    placed = np.array(labels.apart(ax, heights))
    assert np.argsort(placed).tolist() == np.argsort(heights).tolist()
    points = ax.transData.transform([(1, y) for y in sorted(placed)])[:, 1] * 72 / ax.figure.dpi
    assert np.diff(points).min() >= labels.LEADING - 1e-6
    assert placed[2] == pytest.approx(0.9)  # nothing is near it: it stays


def test_pooling_gives_the_nearest_sequence_in_order():
    assert labels.isotonic(np.array([1.0, 3.0, 2.0, 4.0])).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert labels.isotonic(np.array([3.0, 2.0, 1.0])).tolist() == [2.0, 2.0, 2.0]


def test_the_same_figure_is_the_same_file(tmp_path):
    for folder in ("a", "b"):
        plots.save(plots.curves({"fedavg": [rows([0.1, 0.3])]}), tmp_path / folder / "figure")
    for name in ("figure.pdf", "figure.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_drawing_leaves_the_users_own_style_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.curves({"fedavg": [rows([0.1, 0.3])]})
    assert dict(matplotlib.rcParams) == before
