import pytest

from lilliput.report.text import duration, lower_is_better, megabytes, number


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (12_345, "0.012"), (4_560_000, "4.56"), (45_600_000, "45.6"), (12_345_000_000, "12,345")],
)
def test_bytes_are_megabytes_with_three_figures(count, text):
    assert megabytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.523, "0.52 s"), (7.31, "7.3 s"), (59.99, "1:00"), (185, "3:05"), (2 * 3600 + 185, "2:03:05")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_accuracies_are_in_per_cent_and_losses_are_not():
    assert number("clients/accuracy", 0.9123) == "91.2 %" and number("loss", 0.91234) == "0.912"
    assert (number("loss", 1.5e-5), number("loss", 12345.0), number("loss", 0.0)) == ("1.5e-05", "1.23e+04", "0.000")
    assert number("loss", float("nan")) == "nan" and number("loss", float("inf")) == "inf"


def test_which_end_of_a_metric_is_good():
    assert lower_is_better("clients/loss") and lower_is_better("perplexity") and not lower_is_better("accuracy")
