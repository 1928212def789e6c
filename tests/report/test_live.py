import io

import pytest
import torch
from reported import experiment, rows
from rich.console import Console

from lilliput.algorithms import FedAvg
from lilliput.experiment.experiment import Experiment
from lilliput.report.live import Lines, Table, Watch, live
from lilliput.tasks import Supervised


class Clock:
    """Time that passes when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(reporter, made, clock, seconds=2.0, before=()):
    """A run of these rows, each round of two clients and of this many seconds."""
    reporter.start(experiment(rounds=4), list(before))
    for row in made:
        for done in (1, 2):
            clock.now += seconds / 2
            reporter.progress(row["round"], done, 2)
        reporter.row(row)
    reporter.end([*before, *made])


def test_lines_are_one_a_round_with_sums_and_the_time_left():
    text, clock = [], Clock()
    told(Lines(text.append, clock), rows([None, 0.5, 0.4], peak_memory_bytes=7_000_000, dropped=1), clock)
    title, first, second, third, summary = text
    assert title == "Fedavg, 10 clients, 4 rounds"
    assert first.startswith("round 1/4  up 2.00 MB  down 3.00 MB  memory 7.00 MB  simulated 10.0 s  dropped 1")
    assert first.endswith("ETA 6.0 s")  # three rounds are left at 2 s each
    assert "accuracy 50.0 %" in second and "up 4.00 MB" in second and second.endswith("ETA 4.0 s")
    assert third.endswith("ETA 2.0 s")
    assert summary == (
        "3 of 4 rounds: accuracy 40.0 %, best 50.0 % in round 2, 6.00 MB up, 9.00 MB down, "
        "largest client 7.00 MB, 30.0 s simulated, 3 dropped"
    )


def test_a_resumed_run_goes_on_with_its_sums_and_a_fresh_pace():
    text, clock = [], Clock()
    made = rows([0.9, 0.5, 0.6])
    told(Lines(text.append, clock), made[2:], clock, seconds=3.0, before=made[:2])
    assert text[0].endswith("resumed after round 2")
    assert "up 6.00 MB" in text[1] and text[1].endswith("ETA 3.0 s")
    assert "best 90.0 % in round 1" in text[-1]


def test_a_loss_is_best_when_lowest():
    watch = Watch(Clock())
    watch.start(experiment(), [{"round": 1, "loss": 2.0}, {"round": 2, "loss": 1.0}, {"round": 3, "loss": 3.0}])
    assert watch.best.round == 2


def test_the_headline_is_the_targets_metric():
    watch = Watch(Clock())
    watch.start(experiment(target="loss<=0.5"), [{"round": 1, "loss": 2.0, "accuracy": 0.1}])
    watch.add({"round": 2, "loss": 3.0, "accuracy": 0.9})
    assert watch.metric == "loss" and watch.best.round == 1


def test_the_running_round_counts_towards_the_time_left():
    clock = Clock()
    watch = Watch(clock)
    watch.start(experiment(rounds=4), [])
    clock.now = 8.0
    watch.add({"round": 1})
    watch.now = (2, 5, 10)
    assert watch.eta() == "20.0 s"  # two and a half rounds of 8 s


def test_a_profiled_run_says_where_its_time_went():
    text, clock = [], Clock()
    told(Lines(text.append, clock), rows([0.5], **{"seconds/encode": 1.0, "seconds/compute": 3.0}), clock)
    assert "encode 1.0 s (25 %)" in text[-1] and "compute 3.0 s (75 %)" in text[-1]


def test_the_table_shows_rounds_costs_and_the_progress_inside_a_round():
    console, clock = Console(width=100, force_terminal=True, file=io.StringIO(), record=True), Clock()
    table = Table(console, clock)
    table.start(experiment(rounds=4), [])
    table.row(rows([0.5], peak_memory_bytes=7_000_000)[0])
    clock.now += 1.0
    table.progress(2, 3, 10)
    shown = console.file.getvalue()
    assert "3/10 clients" in shown and "round 2/4" in shown and "best 50.0 % in round 1" in shown
    table.end(rows([0.5]))
    for words in ("Fedavg, 10 clients, 4 rounds", "accuracy", "MB down", "peak MB", "simulated", "1 of 4 rounds"):
        assert words in console.file.getvalue()


@pytest.mark.parametrize("made", [[{"round": 0, "accuracy": 0.1}], [{"round": 1}], []])
def test_rows_with_little_in_them_are_shown_too(made):
    console, clock, text = Console(width=80, force_terminal=True, file=io.StringIO()), Clock(), []
    told(Table(console, clock), made, clock)
    told(Lines(text.append, clock), made, clock)
    assert len(text) == 2 + len(made)


def test_the_table_draws_at_most_ten_times_a_second():
    console, clock = Console(width=100, force_terminal=True, file=io.StringIO()), Clock()
    table = Table(console, clock)
    table.start(experiment(), [])
    before = len(console.file.getvalue())
    for done in range(50):
        table.progress(1, done, 50)
    assert len(console.file.getvalue()) == before
    table.end([])


def test_a_terminal_gets_the_table_and_anything_else_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(live(Console(force_terminal=True, file=io.StringIO())), Table)
    assert isinstance(live(Console(force_terminal=True, file=io.StringIO()), plain=True), Lines)
    plain = io.StringIO()
    lines = live(Console(file=plain, width=20))
    lines.start(experiment(), [])
    assert plain.getvalue() == "Fedavg, 10 clients, 4 rounds\n"  # never wrapped: one line is one round


def test_a_run_that_fails_gives_the_terminal_back():
    class Broken(FedAvg):
        def round(self, state, fleet):
            if fleet.round == 2:
                raise RuntimeError("broken")
            return super().round(state, fleet)

    batches = [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]
    console = Console(width=100, force_terminal=True, file=io.StringIO())
    table = Table(console)
    run = Experiment(Broken(), Supervised(torch.nn.Linear(3, 2)), {0: batches}, 3, test=batches, reporters=[table])
    with pytest.raises(RuntimeError, match="broken"):
        run.run("sequential")
    assert not table.live.is_started and "1 of 3 rounds: accuracy" in console.file.getvalue()
