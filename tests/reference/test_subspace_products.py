"""FedSub with P = I and no dual is FedAvg under every product of settings, but for what rounding explains.

Its layers work out x + b where FedAvg's have W, which rounds otherwise; Lion's signs, Adafactor's norms and states of
eight bits blow that up and are drawn in float64 alone.  So do adaptive optimizers and branches beside bf16 and fp16,
which are drawn with SGD.  Not drawn are optimizers that project: b they leave whole.
"""

from __future__ import annotations

import warnings
from typing import Any

import nets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from products import COHORTS, ENGINES, SPACE, Case, described, examples, sensible
from torch import Tensor

import lilliput
from lilliput import algorithms
from lilliput.tasks import Supervised

DRAWN = {
    "method": ["fedavg"],
    "optimizer": [*SPACE["optimizer"], "lion", "adafactor", "adamw8bit", "Adafactor", "ASGD"],
    "downlink": ["means", "model"],
    "refresh": [1, 2],
}
ADAPTIVE = ("adam", "adamw", "adamw8bit", "Adagrad", "Adamax", "RMSprop", "AdamW", "NAdam")
CASES = st.fixed_dictionaries({n: st.sampled_from(v) for n, v in (SPACE | DRAWN).items()})
NAMES = (
    "momentum", "nesterov", "weight_decay", "lr", "local_epochs", "local_steps", "schedule", "warmup", "clip",
    "accumulate", "precision", "checkpointing", "per_layer", "optimizer_state", "buffers",
)  # fmt: skip


def fitting(case: Case) -> Case:
    s = sensible(case)
    if s["tied"] and s["twice"]:  # what is left for subspaces
        s["frozen"] = False
    if s["optimizer"] != "sgd" or s["branch"] == "sometimes":
        s["precision"] = "float32"
    if s["optimizer"] in ("lion", "adafactor", "Adafactor", "adamw8bit"):
        s |= {"dtype": "float64", "precision": "float32"}
    return s


def trained(method: type, s: Case, **others: Any) -> dict[str, Tensor]:
    named = not s["optimizer"][0].isupper()
    options = {"dampening": s["dampening"]} if s["dampening"] else {}
    if s["optimizer"] in ADAPTIVE:
        options["eps"] = s["eps"]
    experiment = lilliput.Experiment(
        method(
            **{n: s[n] for n in NAMES}, **others, optimizer_options=options,
            optimizer=s["optimizer"] if named else getattr(torch.optim, s["optimizer"]),
        ),
        Supervised(nets.Net(s)), examples(s), rounds=s["rounds"], cohorts=COHORTS[s["cohorts"]], quorum=1.0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = experiment.run(engine=ENGINES[s["engine"]]()).state
    return {**state["params"], **state.get("buffers", {})}


def difference(case: Case) -> tuple[float, float]:
    """The largest difference between both methods' models, and the largest that rounding explains."""
    s = fitting(case)
    identity = {"rank": 1.0, "projection": "idx", "dual": "none", "downlink": s["downlink"], "refresh": s["refresh"]}
    whole, within = trained(algorithms.FedAvg, s), trained(algorithms.FedSub, s, **identity)
    assert within.keys() == whole.keys()
    worst = max(float((within[n].double() - x.double()).abs().max()) for n, x in whole.items())
    rounding = 1e-9 if s["dtype"] == "float64" else 2e-5 if s["precision"] == "float32" else 2e-3
    return worst, rounding if s["optimizer"] == "sgd" else 5 * rounding


DRAWN: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=20, **DRAWN)
@given(CASES)
def test_in_full_dimension_without_dual_fedsub_is_fedavg(case: Case) -> None:
    worst, rounding = difference(case)
    assert worst <= rounding, f"{worst}: {described(case)}"


@pytest.mark.slow
@settings(max_examples=80, **DRAWN)
@given(CASES)
def test_it_is_so_in_many_cases(case: Case) -> None:
    test_in_full_dimension_without_dual_fedsub_is_fedavg.hypothesis.inner_test(case)
