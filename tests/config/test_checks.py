"""What can be told to be wrong before any data are read."""

from __future__ import annotations

import pytest

from lilliput.config import settings, words
from lilliput.config.build import cohort, make_algorithm, make_engine, profiles, stop
from lilliput.config.checks import check
from lilliput.engines import Sequential, Workers


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("rounds=0", "rounds=0 must be at least 1"),
        ("clients=0", "clients=0 must be at least 1"),
        ("batch_size=-1", "batch_size=-1 must be at least 1"),
        ("evaluate_every=0", "evaluate_every=0 must be at least 1"),
        ("clients=10 cohort=20", "cohort=20 exceeds clients=10; choose cohort <= 10"),
        ("cohort=0", "cohort=0 must be greater than 0"),
        ("cohort=-1", "cohort=-1 must be greater than 0"),
        ("cohort=1.5", "a number of clients, or a share"),
        ("lr=0", "lr is 0.0; it must be positive"),
        ("lr=-1", "lr is -1.0; it must be positive"),
        ("momentum=-0.5", "momentum is -0.5"),
        ("local_epochs=-1", "local_epochs is -1"),
        ("nesterov=true", "set momentum > 0"),
        ("schedule=zigzag", "constant, cosine"),
        ("rounds=5 warmup=5", "warmup=5 leaves none of 5 rounds"),
        ("warmup=-0.1", "warmup is -0.1; it must not be negative"),
        ("algorithm=fedprox fedprox.mu=-1", "mu is -1.0; it must not be negative"),
        ("algorithm=scaffold optimizer=adam", "SGD"),
        ("partition=dirichlet partition.alpha=0", "dirichlet.alpha=0.0 must be greater than 0"),
        ("partition=shards shards.shards_per_client=0", "must be at least 1"),
        ("quorum=2", "quorum=2.0 must be between 0 and 1"),
        ("test_fraction=1", "less than 1"),
        ("timeout=0", "greater than 0"),
        ("target=good", "target 'good' is not like"),
        ("comm_threshold_mb=0", "greater than 0"),
        ("device=tpu", "device=tpu is not one of auto, cpu"),
        ("engine.workers=0", "must be at least 1"),
        ("init=nowhere.pt", "no such file of weights"),
        ("codec=bf16+zip", "unknown codec 'zip'"),
        ("codec=int8:cut+bf61", "unknown codec 'bf61'; did you mean 'bf16'"),
        ("device_profile.availability=2", "availability is 2.0"),
        ("profiles=nowhere.yaml", "no configuration file nowhere.yaml"),
        ("name=..", "no name for a folder"),
    ],
)
def test_what_cannot_run_is_refused_with_rule_and_remedy(typed: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer) as refused:
        check(settings(words(typed.split())))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "cohort=0.5",
        "algorithm=centralized cohort=50 clients=10",
        "target=0.9",
        "codec=bf16+bf16",
        "codec=int8:activations+bf16",
    ],
)
def test_what_can_run_is_not(typed: str) -> None:
    check(settings(words(typed.split())))


@pytest.mark.parametrize(
    ("share", "clients", "chosen"),
    [(0.1, 100, 10), (0.29, 100, 29), (0.01, 10, 1), (3, 10, 3), (None, 10, None), (0.5, None, None)],
)
def test_a_cohort_may_be_a_share_of_the_clients(share: float | None, clients: int | None, chosen: int | None) -> None:
    assert cohort(share, clients) == chosen


def test_a_node_of_the_optimizer_is_its_options() -> None:
    s = settings(words(["optimizer=adamw", "adamw.eps=1e-5", "optimizer_options.betas=[0.5,0.9]"]))
    method = make_algorithm(s, 10)
    assert method.optimizer == "adamw" and method.optimizer_options == {"eps": 1e-5, "betas": [0.5, 0.9]}


def test_slices_and_combines_are_made_by_name() -> None:
    method = make_algorithm(settings(words(["combine=uniform_mean", "slice=full"])), 10)
    assert method.combine.weight == "uniform" and repr(method.slice) == "full()"


def test_engines_are_made_by_name_with_their_node() -> None:
    engine = make_engine(settings(words(["engine=workers", "workers.workers=3", "device=cpu"])))
    assert isinstance(engine, Workers) and engine.slots == 3
    engine = make_engine(settings(words(["engine=sequential", "engine.wire=true"])))
    assert isinstance(engine, Sequential) and engine.wire


def test_a_bare_target_is_an_accuracy() -> None:
    assert stop(settings({"target": 0.9})).target == "accuracy>=0.9"
    assert stop(settings({"target": "loss<=0.5"})).target == "loss<=0.5"


def test_profiles_may_differ_by_client(tmp_path) -> None:
    file = tmp_path / "devices.yaml"
    file.write_text("0: {memory_bytes: 4000000}\n3: {up_bps: 1e6, availability: 0.5}\n")
    found = profiles(settings({"profiles": str(file), "device_profile.up_bps": 5e6}))
    assert found[0].memory_bytes == 4_000_000 and found[0].up_bps == 5e6
    assert (found[3].up_bps, found[3].availability) == (1e6, 0.5)
    file.write_text("zero: {memory_bytes: 1}\n")
    with pytest.raises(ValueError, match=r"'zero\.memory_bytes' is not like"):
        profiles(settings({"profiles": str(file)}))
