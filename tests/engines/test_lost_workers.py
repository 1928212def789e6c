"""What a worker process takes with it when it ends is computed again: nothing is lost without a word."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import TwoCalls, assert_same_history, assert_same_state, batches, experiment, network

import lilliput
from lilliput.algorithms import FedAvg
from lilliput.core.fleet import Client, Profile, on_client
from lilliput.core.tree import Body
from lilliput.data.batches import as_batches
from lilliput.engines import Round, Sequential, Workers
from lilliput.engines.device import Job
from lilliput.engines.serving import interrupts_deferred
from lilliput.tasks import Supervised
from lilliput.wire.store import Store

ENGINES: dict[str, Callable[[], Any]] = {
    "sequential": Sequential,
    "wire": lambda: Sequential(wire=True),
    "workers": lambda: Workers(2),
}


def run(algorithm: Any, engine: Any, clients: int = 6, **options: Any) -> lilliput.History:
    return lilliput.Experiment(
        algorithm, Supervised(network(bn=False)), batches(clients), **{"rounds": 3, **options}
    ).run(engine)


def stop_a_worker(engine: Any, number: int) -> None:
    process = engine._workers[number].process
    process.kill()
    process.join()


@dataclass(frozen=True)
class Struck(TwoCalls):
    """TwoCalls, one of whose workers ends once at a moment of round 2, with what it has staged."""

    moment: str = ""

    def round(self, state: Body, fleet: Any) -> Body:
        struck = fleet.round == 2 and fleet.attempt == 0
        if struck and self.moment == "before the round":
            stop_a_worker(fleet.engine, 0)
        out = super().round(state, fleet)
        if struck and self.moment == "after the replies":
            stop_a_worker(fleet.engine, 1)
        if struck and self.moment == "all of them":
            stop_a_worker(fleet.engine, 0)
            stop_a_worker(fleet.engine, 1)
        return out


@pytest.mark.parametrize("moment", ["before the round", "after the replies", "all of them"])
def test_a_worker_that_ends_once_changes_no_bit(moment: str) -> None:
    straight = run(TwoCalls(), Sequential(), rounds=4)
    struck = run(Struck(moment=moment), Workers(2), rounds=4)
    assert_same_history(straight, struck)
    assert [row["dropped"] for row in struck.rows] == [0] * 4


@dataclass(frozen=True)
class Deadly(TwoCalls):
    """TwoCalls whose client 2 ends its process in the second call of every round from the second on."""

    @on_client(like={"delta": "buffer"})
    def weigh(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        if client.id == 2 and client.round > 1:
            os._exit(7)
        return super().weigh(client, state, msg)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_client_that_ends_its_process_every_round_is_dropped_alone(workers: int, tmp_path: Path) -> None:
    history = run(Deadly(), Workers(workers), folder=tmp_path)
    assert [row["dropped"] for row in history.rows] == [0, 1, 1]
    without = run(TwoCalls(), Sequential(), cohorts=[[0, 1, 2, 3, 4, 5], [0, 1, 3, 4, 5], [0, 1, 3, 4, 5]])
    assert_same_state(without.state, history.state)
    entries = [json.loads(line)["calls"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    for calls in entries[1:]:
        assert {e["client"]: e["error"] for e in calls if e["error"]} == {
            2: "its worker process died, 2 times in this round"
        }


@dataclass(frozen=True)
class Strange(FedAvg):
    """FedAvg whose client 2 makes a state that no wire carries."""

    @on_client(like={"delta": "params"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        reply, state = super().train(client, state, msg)
        return reply, {**state, "seen": {1, 2}} if client.id == 2 else state


@pytest.mark.parametrize("engine", ENGINES)
def test_a_state_that_cannot_be_encoded_is_its_clients_failure(engine: str, tmp_path: Path) -> None:
    history = run(Strange(), ENGINES[engine](), folder=tmp_path)
    assert [row["dropped"] for row in history.rows] == [1, 1, 1]
    assert "'seen' is a set; a body holds" in (tmp_path / "ledger.jsonl").read_text()


@dataclass(frozen=True)
class Hoarding(FedAvg):
    """FedAvg whose clients keep so many names that the states of a few fill a header."""

    @on_client(like={"delta": "params"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        reply, _ = super().train(client, state, msg)
        return reply, {"names": {f"{i:0100}": torch.tensor(float(client.id)) for i in range(4000)}}


def test_states_that_exceed_a_header_together_all_come_back(tmp_path: Path) -> None:
    run(Hoarding(), Workers(1), clients=14, rounds=1, folder=tmp_path)
    states = json.loads((tmp_path / "checkpoint" / "manifest.json").read_text())["states"]
    assert sorted(states) == sorted(f"client/{c}" for c in range(14))


def test_an_interrupt_within_a_fork_is_not_lost() -> None:
    def interrupted() -> None:
        left = [1]
        os.register_at_fork(before=lambda: left and (left.pop(), signal.raise_signal(signal.SIGINT)))
        try:
            experiment("fedavg").run(Workers(2))
        except KeyboardInterrupt:
            os._exit(42)
        os._exit(0)

    process = mp.get_context("fork").Process(target=interrupted)
    process.start()
    process.join(60)
    assert process.exitcode == 42


def test_a_deferred_interrupt_comes_after_the_block() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


@dataclass(frozen=True)
class Sleepy(FedAvg):
    @on_client
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        time.sleep(60)
        return {}, state


def job_of(algorithm: Any) -> Job:
    data = {c: as_batches(b) for c, b in batches().items()}
    return Job("run", algorithm, Supervised(network()), data, {c: Profile() for c in data})


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads processes from /proc")
def test_workers_end_with_their_parent_even_in_the_middle_of_a_handler() -> None:
    ours, theirs = mp.get_context("fork").Pipe()

    def parent() -> None:
        engine = Workers(2)
        engine.open(job_of(Sleepy()))
        fleet = Round(engine, engine._job, Store(), 1)
        fleet.call(Sleepy().train)
        theirs.send([w.process.pid for w in engine._workers])
        time.sleep(60)

    process = mp.get_context("fork").Process(target=parent)
    process.start()
    assert ours.poll(60), "the process never named its workers"
    pids = ours.recv()
    process.kill()
    process.join()
    until = time.monotonic() + 30
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads descriptors from /proc")
def test_a_worker_holds_no_end_of_anothers_pipes() -> None:
    before = sockets("self")
    engine = Workers(3)
    engine.open(job_of(FedAvg()))
    for worker in engine._workers:  # each has answered, so each has closed what it inherited
        worker.control.send(("commit", []))
        assert worker.control.recv() == []
    held = [sockets(w.process.pid) - before for w in engine._workers]
    mine = sockets("self") - before
    engine.close()
    assert [len(found) for found in held] == [2, 2, 2] and len(set.union(*held)) == 6
    assert not mine & set.union(*held)


def sockets(pid: int | str) -> set[str]:
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    return {link for link in links if link.startswith("socket:")}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads descriptors from /proc")
def test_lost_workers_leave_no_descriptors() -> None:
    run(Struck(moment="all of them"), Workers(2))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        run(Struck(moment="after the replies"), Workers(2))
    assert len(os.listdir("/proc/self/fd")) == before


@dataclass(frozen=True)
class Late(FedAvg):
    @on_client(like={"delta": "params"})
    def train(self, client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
        if client.id == 2:
            time.sleep(60)
        return super().train(client, state, msg)


@pytest.mark.parametrize("engine", ["workers", "auto"])
def test_a_client_that_overruns_its_time_is_dropped_alone(engine: str) -> None:
    history = run(Late(), Workers(1) if engine == "workers" else engine, rounds=1, timeout=1.5)
    assert history.rows[0]["dropped"] == 1 and history.rows[0]["clients"] == 5


@pytest.mark.parametrize("engine", ["sequential", "dry"])
def test_a_timeout_is_refused_where_nothing_can_enforce_it(engine: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"timeout is 2, and .* cannot end a client that takes longer; use engine=w"):
        run(FedAvg(), engine, timeout=2.0, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
