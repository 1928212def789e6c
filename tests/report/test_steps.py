import io
from types import SimpleNamespace

from rich.console import Console

from lilliput.report.steps import StepLines, StepTable, live_steps, quantity


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(step=0, total=40):
    c = SimpleNamespace(model="llama_60m", optimizer="galore_adamw", total_steps=total)
    return SimpleNamespace(c=c, progress=SimpleNamespace(step=step))


def row(step, **more):
    return {
        "round": step, "train_loss": 5.25, "lr": 0.01, "tokens": step * 51_200, "tokens_per_second": 12_345.6,
        "examples_per_second": 48.2, "peak_memory_bytes": 1_500_000_000, **more,
    }  # fmt: skip


def told(reporter, clock, rows, start=0):
    reporter.start(run(start), [])
    for one in rows:
        clock.now += 3.0
        reporter.progress(one["round"], 0, 0)
        reporter.row(one)
    reporter.end(rows)


def test_lines_are_rows_with_the_time_left():
    text, clock = [], Clock()
    told(StepLines(text.append, clock), clock, [row(10), row(20, perplexity=33.21), row(40)])
    title, first, second, third, summary = text
    assert title == "llama_60m, galore_adamw, 40 steps"
    assert first == (
        "step 10  loss 5.250  lr 1.00e-02  tokens 512K  tokens/s 12,346  examples/s 48.2  peak MB 1,500  ETA 9.0 s"
    )
    assert "perplexity 33.210" in second and second.endswith("ETA 6.0 s")
    assert "ETA" not in third
    assert summary == "40 of 40 steps: perplexity 33.210, 2.05M tokens, 12,346 tokens/s, peak 1,500 MB"


def test_a_resumed_run_says_where_it_goes_on_and_has_a_pace_of_its_own():
    text, clock = [], Clock()
    told(StepLines(text.append, clock), clock, [row(30)], start=20)
    assert text[0].endswith("40 steps, resumed after step 20") and text[1].endswith("ETA 3.0 s")


def test_a_run_that_ends_before_its_first_row_has_a_summary():
    text = []
    told(StepLines(text.append, Clock()), Clock(), [])
    assert text[-1] == "0 of 40 steps"


def test_the_table_shows_the_last_rows_and_the_progress():
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=110)
    table = live_steps(console)
    assert isinstance(table, StepTable)
    table.state.clock = clock
    told(table, clock, [row(step, perplexity=30.0) for step in range(1, 13)])
    shown = out.getvalue()
    assert "perplexity" in shown and "step 12/40" in shown and "ETA" in shown
    assert len(table.rows) == 10 and table.rows[0]["round"] == 3


def test_lines_off_a_terminal():
    assert isinstance(live_steps(Console(file=io.StringIO())), StepLines)
    assert isinstance(live_steps(Console(force_terminal=True), plain=True), StepLines)


def test_quantities_of_tokens_read_as_they_are_typed():
    assert [quantity(n) for n in (512, 20_480, 1_100_000_000)] == ["512", "20.5K", "1.1B"]
