"""`lilliput new method NAME`: a running method of the user's own in one file, and the laws it must obey in another."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lilliput.cli.arguments import Line

METHOD = '''"""{Class}: say here what the idea is, which paper it is from, and where this differs from it.

As it stands it is FedAvg with momentum at the server (Hsu, Qi and Brown, 2019, https://arxiv.org/abs/1909.06335):
v+ = beta v + mean_i(y_i - x), x+ = x + v+, with x the model that was sent and y_i what client i made of it.

    lilliput run algorithm={name}.py:{Class} {name}.beta=0.9
"""

from dataclasses import dataclass

from lilliput import on_client
from lilliput.algorithms.fedavg import FedAvg, advance, model_for, model_reply, model_sums, train
from lilliput.core.tree import add, zeros_like
from lilliput.submodel import reduce


@dataclass(frozen=True)
class {Class}(FedAvg):
    """FedAvg with momentum at the server.

    beta: how much of the last rounds' direction is kept; with 0 this is FedAvg.
    """

    beta: float = 0.5

    def init(self, task):
        """The server's state: what FedAvg has, and the velocity."""
        state = super().init(task)
        return {{**state, "velocity": zeros_like(state["params"])}}

    def round(self, state, fleet):
        """The server's half of a round."""
        held = {{c: self.slice(fleet, c) for c in fleet.sample(self.cohort)}}
        replies = fleet.call(self.train, each=lambda c: model_for(held[c], state), to=list(held))
        sums = reduce(replies, held, **model_sums(self.combine, state))
        velocity = add(sums["delta"], state["velocity"], self.beta)
        return {{**state, **advance(self.combine, state, {{**sums, "delta": velocity}}), "velocity": velocity}}

    @on_client(like={{"delta": "params", "buffer_delta": "buffers"}})
    def train(self, client, state, msg):
        """The device's half: (reply, its state).  What a client keeps between rounds goes into its state."""
        params, state, stats = train(self, client, state, msg)
        return model_reply(msg, params, stats), state
'''

TEST = '''"""The laws of {Class}: what holds for every method, and what should hold for this one."""

import pytest
import torch
from lilliput import Experiment
from lilliput.algorithms import FedAvg
from lilliput.engines import Sequential, Workers
from lilliput.tasks import Supervised

from {name} import {Class}

CLIENTS, FEATURES, CLASSES = 4, 6, 3


def experiment(algorithm, rounds=4, **settings):
    """A fresh linear model, and two batches of its own for each client."""
    draw = torch.Generator().manual_seed(0)
    data = {{
        c: [(torch.randn(5, FEATURES, generator=draw), torch.randint(CLASSES, (5,), generator=draw)) for _ in range(2)]
        for c in range(CLIENTS)
    }}
    torch.manual_seed(0)
    return Experiment(algorithm, Supervised(torch.nn.Linear(FEATURES, CLASSES)), data, rounds, **settings)


def params(history):
    return history.state["params"]


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("engine", [Sequential(wire=True), Workers(2)], ids=repr)
def test_every_engine_gives_the_same_bits(engine):
    reference = experiment({Class}(cohort=3)).run(Sequential())
    assert equal(params(reference), params(experiment({Class}(cohort=3)).run(engine)))


def test_resumed_run_equals_straight_run(tmp_path):
    experiment({Class}(), rounds=2, folder=tmp_path).run(Sequential())
    resumed = experiment({Class}(), rounds=4, folder=tmp_path).run(Sequential(), resume=True)
    assert equal(params(resumed), params(experiment({Class}(), rounds=4).run(Sequential())))


def test_no_local_steps_leave_the_model_unchanged():
    run = experiment({Class}(local_epochs=0))
    before = run.task.init()["params"]
    assert equal(before, params(run.run(Sequential())))


def test_without_momentum_it_is_fedavg():
    own = experiment({Class}(beta=0.0)).run(Sequential())
    assert equal(params(own), params(experiment(FedAvg()).run(Sequential())))
'''


def main(argv: Sequence[str]) -> int:
    """Run the command; its exit status."""
    flags, words = Line(folder="a folder").parse(argv)
    if len(words) != 2 or words[0] != "method":
        raise ValueError("write `lilliput new method NAME`")
    for path in write(words[1], Path(flags["folder"] or "")):
        print(path)
    return 0


def write(text: str, folder: Path) -> list[Path]:
    """Write a method of this name and its test.  Raises ValueError for a name that cannot be one, or is taken."""
    name, class_name = names(text)
    files = {folder / f"{name}.py": METHOD, folder / f"test_{name}.py": TEST}
    for path in files:
        if path.exists():
            raise ValueError(f"{path} exists; remove it, or choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    for path, template in files.items():
        path.write_text(template.format(Class=class_name, name=name), encoding="utf-8")
    return list(files)


def names(text: str) -> tuple[str, str]:
    """`my-method`, `my_method` or `MyMethod` as the file's name and the class's."""
    from lilliput.algorithms import ALGORITHMS
    from lilliput.core.registry import normal

    words = [w for part in re.split(r"[-_\s]+", text) for w in re.split(r"(?<=[a-z0-9])(?=[A-Z])", part) if w]
    name = "_".join(word.lower() for word in words)
    if not name.isidentifier():
        raise ValueError(f"{text!r} cannot be the name of a class; use letters and digits, beginning with a letter")
    if normal(name) in map(normal, ALGORITHMS):
        raise ValueError(f"there is a method {name!r} already; choose another name")
    if _is_installed(name):
        raise ValueError(f"{name!r} is the name of an installed module; choose another name")
    return name, "".join(word[:1].upper() + word[1:] for word in words)


def _is_installed(module: str) -> bool:
    """Whether a library has this name: a file of the same name could then not be imported beside it."""
    if module in sys.stdlib_module_names:
        return True
    spec = importlib.util.find_spec(module)
    return spec is not None and str(spec.origin).startswith((sys.prefix, sys.base_prefix))
