"""Stop rules: the first that holds ends the run, after the round in which it does."""

import pytest
from fixtures import experiment
from hypothesis import given
from hypothesis import strategies as st

from lilliput import Experiment, Stop
from lilliput.experiment.stop import Watch, headline


def rows(**values: list[float]) -> list[dict]:
    n = len(next(iter(values.values())))
    base = {"up_bytes": 1_000_000, "down_bytes": 500_000, "seconds": 2.0}
    return [{**base, **{k: v[i] for k, v in values.items()}} for i in range(n)]


def test_targets_of_either_direction() -> None:
    assert Stop(target="accuracy>=0.9").reason(rows(accuracy=[0.5, 0.91])) == "reached accuracy>=0.9"
    assert Stop(target="accuracy>=0.9").reason(rows(accuracy=[0.95, 0.5])) is None
    assert Stop(target="clients/loss<=0.3").reason(rows(**{"clients/loss": [0.2]}))


def test_bytes_and_seconds_add_up_over_rounds() -> None:
    assert Stop(comm_threshold_mb=3.0).reason(rows(accuracy=[0.1])) is None
    assert Stop(comm_threshold_mb=3.0).reason(rows(accuracy=[0.1, 0.2])) == "sent 3.0 MB"
    assert Stop(seconds=5).reason(rows(accuracy=[0.1] * 3)) == "ran for 5 seconds"


def test_patience_counts_evaluations_since_the_best() -> None:
    stop = Stop(patience=2)
    assert stop.reason(rows(accuracy=[0.1, 0.3, 0.2])) is None
    assert stop.reason(rows(accuracy=[0.1, 0.3, 0.2, 0.3])) == "no better value in 2 evaluations"
    assert Stop(patience=2, target="loss<=0").reason(rows(loss=[3.0, 1.0, 2.0, 2.0]))


@given(st.lists(st.tuples(st.sampled_from(["accuracy", "loss", "none"]), st.integers(0, 4)), min_size=1, max_size=12))
def test_rows_seen_one_by_one_say_what_all_of_them_say(seen: list[tuple[str, int]]) -> None:
    """Against the definition over all rows: evaluations since the best value of the first metric there is."""
    watch, so_far = Watch(Stop(patience=2)), []
    for name, value in seen:
        so_far.append({"up_bytes": 1, "down_bytes": 2, "seconds": 0.5, name: float(value)})
        watch.see(so_far[-1])
        metric = headline(so_far)
        values = [row[metric[0]] for row in so_far if metric and metric[0] in row]
        best = (max if metric and metric[1] == ">=" else min)(values, default=None)
        stale = len(values) - 1 - values.index(best) if values else 0
        assert watch.stale == stale and bool(watch.reason()) == (stale >= 2)
        assert (watch.sent, watch.seconds) == (3 * len(so_far), 0.5 * len(so_far))


def test_what_a_round_costs_does_not_grow_with_rounds_or_clients(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The run's identity, which looks at every client, is told once; its rules look at the new row alone."""
    told = []
    whole = Experiment.identity
    monkeypatch.setattr(Experiment, "identity", lambda self: told.append(1) or whole(self))
    looked = []
    see = Watch.see
    monkeypatch.setattr(Watch, "see", lambda self, row: looked.append(row["round"]) or see(self, row))
    experiment("fedavg", rounds=6, folder=tmp_path, checkpoint_every=1, stop=Stop(patience=50)).run("sequential")
    assert len(told) == 1 and looked == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("bad", ["accuracy", "accuracy>0.9", "accuracy>=high"])
def test_a_target_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="is not like"):
        Stop(target=bad)


def test_every_method_stops_at_its_byte_budget() -> None:
    for name in ("fedavg", "scaffold", "two_calls", "splitfed_v1", "fsl_sage"):
        first = experiment(name, rounds=1, evaluate="none").run("sequential").rows[0]
        budget = 2.5 * (first["up_bytes"] + first["down_bytes"]) / 1e6
        history = experiment(name, rounds=9, evaluate="none", stop=Stop(comm_threshold_mb=budget)).run("sequential")
        assert len(history.rows) == 3 and history.stopped.startswith("sent")


def test_a_resumed_run_that_had_stopped_does_not_go_on(tmp_path) -> None:  # type: ignore[no-untyped-def]
    stop = Stop(comm_threshold_mb=1e-6)
    experiment("fedavg", rounds=9, stop=stop, folder=tmp_path).run("sequential")
    assert len(experiment("fedavg", rounds=9, stop=stop, folder=tmp_path).run("sequential", resume=True).rows) == 1
