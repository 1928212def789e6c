"""Evaluation at the server, at the clients, or both: means, worst deciles, per client."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.core.fleet import Client, Model, on_client
from lilliput.core.tree import Body


@on_client(like={"metrics": dict, "examples": int})
def evaluate(client: Client, state: Body, msg: Body) -> tuple[Body, Body]:
    """The device's half: metrics of the model it is sent, on the test data that it holds."""
    metrics = client.task.evaluate(msg["params"], msg.get("buffers"), client.test, client.device)
    return {"metrics": metrics, "examples": client.test.examples}, state


def run(experiment: Any, state: Body, fleet: Any) -> tuple[dict[Any, Model], dict[str, float]]:
    """(models, metrics) after a round.  `fleet` is one that counts its calls as evaluation."""
    models = experiment.algorithm.models(state, fleet)
    metrics: dict[str, float] = {}
    if experiment.evaluate in ("server", "both"):
        metrics |= at_server(experiment.task, models, experiment.test)
    if experiment.evaluate in ("clients", "both"):
        metrics |= at_clients(fleet, models, experiment.client_test)
    fleet.close_stream()
    fleet.engine.commit(())
    return models, metrics


def saved(models: Mapping[Any, Model]) -> Body:
    """Models as a Body: name -> params, buffers; without those that are slices of another."""
    whole = {name: m for name, m in models.items() if m.slice is None}
    return {str(name): {"params": m.params, "buffers": m.buffers or {}} for name, m in whole.items()}


def at_server(task: Any, models: Mapping[Any, Model], data: Any, device: str = "cpu") -> dict[str, float]:
    """Metrics of each model on the server's test set.

    The first model's stand under plain names, further ones under "<model>/<metric>".  Clients' own models, named by
    client id, are summed up by mean and worst decile.  The means of slices of one model stand under "tiers/<metric>".
    """
    results = {name: task.evaluate(m.params, m.buffers, data, device) for name, m in models.items()}
    if all(isinstance(name, int) for name in results):
        return spread({c: (1, metrics) for c, metrics in results.items()}, "")
    out: dict[str, float] = {}
    for number, (name, metrics) in enumerate(results.items()):
        out |= {(f"{name}/{k}" if number else k): v for k, v in metrics.items()}
    tiers = [results[name] for name, m in models.items() if m.slice is not None]
    return out | {f"tiers/{k}": sum(m[k] for m in tiers) / len(tiers) for k in (tiers[0] if tiers else ())}


def at_clients(fleet: Any, models: Mapping[Any, Model], tests: Mapping[int, Any]) -> dict[str, float]:
    """Metrics on each client's own test data: its own model where it has one, else the first."""
    shared = next(iter(models.values()))

    def message(c: int) -> Body:
        model = models.get(c, shared)
        return {"params": model.params, **({"buffers": model.buffers} if model.buffers else {})}

    replies = fleet.call(evaluate, each=message, to=sorted(tests))
    results = {reply.client: (reply.body["examples"], reply.metrics) for reply in replies}
    return spread(results, "clients/")


def spread(results: Mapping[int, tuple[int, Mapping[str, float]]], prefix: str) -> dict[str, float]:
    """Example-weighted means over clients, and the mean of the worst tenth of them where larger is better."""
    out: dict[str, float] = {}
    total = sum(n for n, _ in results.values())
    for name in next(iter(results.values()))[1]:
        out[f"{prefix}{name}"] = sum(n * m[name] for n, m in results.values()) / total
        if name not in ("loss", "perplexity"):
            out[f"{prefix}{name}/worst_decile"] = worst_decile([m[name] for _, m in results.values()])
    return out


def worst_decile(values: Sequence[float]) -> float:
    """The mean of the smallest tenth of the values (at least one)."""
    worst = sorted(values)[: max(1, math.ceil(len(values) / 10))]
    return sum(worst) / len(worst)
