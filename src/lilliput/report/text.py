"""Numbers as text for people: megabytes, durations, metrics."""

from __future__ import annotations

import math


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a loss or a perplexity rather than a score."""
    return any(word in metric.rsplit("/", 1)[-1] for word in ("loss", "perplexity", "error"))


def is_share(metric: str) -> bool:
    """Whether a metric is a share of 1 to show in per cent: an accuracy, by its name."""
    return "accuracy" in metric


def number(metric: str, value: float) -> str:
    """A metric's value: accuracies in per cent, others with three decimals, or three figures if tiny or huge."""
    if is_share(metric):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def megabytes(count: float) -> str:
    """Bytes in MB (10^6), with three figures and at most three decimals: 0.012, 4.56, 123, 12,345."""
    mb = count / 1e6
    digits = 0 if mb == 0 or mb >= 100 else min(3, 2 - math.floor(math.log10(mb)))
    return f"{mb:,.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds as 0.52 s, 7.3 s, 3:05 or 2:03:05."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
