"""From settings to an experiment: data, model, task, method and engine, each made by what it was named."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from lilliput.config import cutting
from lilliput.config.axes import AXES, LORA, PROFILE
from lilliput.config.layers import from_file
from lilliput.config.reader import changed
from lilliput.config.settings import Settings
from lilliput.core import random
from lilliput.core.fleet import Profile
from lilliput.experiment import checkpoint
from lilliput.experiment.experiment import Experiment
from lilliput.experiment.stop import Stop


@dataclass(frozen=True)
class Built:
    """An experiment ready to run, its settings with nothing left to the data, and its data as they lie on clients."""

    experiment: Experiment
    settings: Settings
    engine: Any
    dataset: Any
    federated: Any
    remarks: tuple[str, ...]  # on settings that do nothing now that the data have chosen


def build(s: Settings, folder: Path | None = None, reporters: Any = ()) -> Built:
    """Load the data, make the model and lay out the experiment.

    Raises ValueError, before anything trains, for what does not go together.
    """
    dataset = load(s)
    typed, s = s, settled(s, dataset)
    remarks = tuple(remark for key, remark in s.notes.items() if key not in typed.notes)
    federated = federate(s, dataset)
    algorithm = make_algorithm(s, len(federated.train))
    task = make_task(s, dataset, federated, algorithm)
    experiment = Experiment(
        algorithm, task, federated.train, s["rounds"], seed=s["seed"],
        test=federated.test, client_test=federated.client_test, evaluate=s["evaluate"],
        evaluate_every=s["evaluate_every"], profiles=profiles(s), codec=make_codec(s), quorum=s["quorum"],
        timeout=s["timeout"], stop=stop(s), folder=folder, checkpoint_every=s["checkpoint_every"],
        profile=None if s["profile"] == "none" else s["profile"], reporters=reporters,
        reply_limit=reply_limit(task),
    )  # fmt: skip
    return Built(experiment, s, make_engine(s), dataset, federated, remarks)


def load(s: Settings) -> Any:
    """The data set."""
    from lilliput import data

    return data.load(s["dataset"], **s.node("dataset"))


def settled(s: Settings, dataset: Any) -> Settings:
    """The settings with what was left to the data: its model, its partition and its number of clients."""
    found: dict[str, Any] = {}
    if s["model"] == "auto":
        image = dataset.kind == "image" and min(dataset.shape[-2:]) >= 16
        found["model"] = {"text": "char_lm", "tokens": "gpt2"}.get(dataset.kind) or ("cnn" if image else "mlp")
    if s["partition"] == "auto":
        found["partition"] = "iid" if dataset.owners is None else "natural"
    if s["clients"] is None:
        natural = found.get("partition", s["partition"]) == "natural" and dataset.owners is not None
        found["clients"] = int(dataset.owners.max()) + 1 if natural else 10
    if cutting.is_split(s.choices["algorithm"].target):
        published = cutting.default(str(found.get("model", s["model"])), s.nodes["cut"])
        found |= {"cut.at": published} if published else {}
    return changed(s, found) if found else s


def federate(s: Settings, dataset: Any) -> Any:
    """The data as it lies on the clients."""
    from lilliput import data

    federated = data.federate(
        dataset, s["partition"], s["clients"], s["batch_size"], s["seed"], s["augment"], s["test_fraction"],
        **s.node("partition"),
    )  # fmt: skip
    if s["evaluate"] in ("clients", "both") and not federated.client_test:
        raise ValueError(
            f"evaluate={s['evaluate']} needs test data at the clients; set test_fraction=0.2, or evaluate=server"
        )
    return federated


def make_task(s: Settings, dataset: Any, federated: Any, algorithm: Any) -> Any:
    """The model under the run's seed or with the weights of `init`, and its loss; cut in two for split methods."""
    from lilliput import models
    from lilliput.splitter import Split
    from lilliput.tasks import Supervised, accuracy, perplexity

    metrics = {"accuracy": accuracy} | ({"perplexity": perplexity} if dataset.kind in ("text", "tokens") else {})
    # A dry run allocates nothing, unless text is to be cut: what of a padding mask must travel depends on its values.
    empty = s["engine"] == "dry" and not (dataset.kind == "tokens" and cutting.is_split(algorithm))
    where = torch.device("meta") if empty else nullcontext()
    with random.seeded(s["seed"], "model"), where:
        model = models.build(s["model"], shape=dataset.shape, classes=dataset.classes, **s.node("model"))
        if s["init"] is not None and s["engine"] != "dry":
            models.load_weights(model, *checkpoint.initial(Path(s["init"])))
        if dataset.kind == "tokens":
            models.check_language(s["model"], model)
        if LORA in s.nodes:
            models.lora(model, **s.nodes[LORA])
        options = {"loss": make_loss(s), "metrics": metrics, "tokens_per_example": dataset.tokens_per_example}
        if cutting.is_split(algorithm):
            try:
                return Split.of(model, **cutting.options(s, algorithm, model, federated), **options)
            except ValueError as error:
                raise ValueError(f"cut: {error}") from error
    return Supervised(model, **options)


def reply_limit(task: Any) -> int:
    """Bytes that a device may reply with: 1 GiB, or twice the model where that is more."""
    return max(1 << 30, 2 * sum(p.numel() * p.element_size() for p in task.model.parameters()))


def make_loss(s: Settings) -> Callable[..., Any]:
    """The loss: a function of (logits, labels), or a class whose objects are."""
    target: Any = s.choices["loss"].target
    node = s.node("loss")
    if isinstance(target, type):
        return target(**node)
    if not node:
        return target
    return functools.partial(target, **node)


def make_algorithm(s: Settings, clients: int | None) -> Any:
    """The method with its fields, its slice rule and its combine."""
    target = s.choices["algorithm"].target
    known = {f.name for f in fields(target)} if is_dataclass(target) else set(inspect.signature(target).parameters)
    given = {name: s[name] for name in known & s.top.keys() if name not in ("slice", "combine")}
    given |= s.node("algorithm")
    if "cohort" in given:
        given["cohort"] = cohort(given["cohort"], clients)
    for axis in {"slice", "combine"} & known & s.choices.keys():
        given[axis] = s.choices[axis].target(**s.node(axis))
    return target(**given | _optimizer(s, known))


def _optimizer(s: Settings, known: set[str]) -> dict[str, Any]:
    """The optimizer, ours by name and others as they are, and what its node says."""
    choice = s.choices.get("optimizer")
    if choice is None or "optimizer" not in known:
        return {}
    ours = choice.name in AXES["optimizer"].names()
    made: dict[str, Any] = {"optimizer": choice.name if ours else choice.target}
    if "optimizer_options" in known:
        made["optimizer_options"] = {**s.node("optimizer"), **s["optimizer_options"]}
    return made


def cohort(value: float | None, clients: int | None) -> int | None:
    """Clients per round, from a number or a share of them; all of them for None, or while their number is not known."""
    if value is None or (clients is None and value < 1):
        return None
    return max(1, int(round(value * clients, 9))) if clients and value < 1 else int(value)


def make_codec(s: Settings) -> Any:
    """The codec of the name, or of names joined by +; None for none."""
    from lilliput.wire import codecs

    if s["codec"] is None:
        return None
    choice = s.choices.get("codec")
    return choice.target(**s.node("codec")) if choice else codecs.build(s["codec"])


def make_engine(s: Settings) -> Any:
    """The engine on its devices.  Raises ValueError for a device that is not here."""
    from lilliput import engines

    name, where = s["engine"], device(s)
    if "," in where:
        if name not in ("auto", "workers"):
            raise ValueError(f"engine={name} runs on one device, not on {where}; choose engine=workers")
        name = "workers"
    if name not in engines.ENGINES:
        return s.choices["engine"].target(device=where, **s.node("engine"))
    return engines.resolve(name, device=where, **s.node("engine"))


def device(s: Settings) -> str:
    """Where training happens: `cpu`, `cuda`, `cuda:0,1` or `mps`; `auto` is a GPU where there is one."""
    name = str(s["device"])
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, numbers = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (numbers and (kind != "cuda" or not numbers.replace(",", "").isdigit())):
        raise ValueError(f"device={name} is not one of auto, cpu, cuda, cuda:0, cuda:0,1 and mps")
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here[kind]:
        raise ValueError(f"device={name}, but torch finds no {kind} device here; `lilliput doctor` tells more")
    return name


def profiles(s: Settings) -> Mapping[int, Profile] | Profile | None:
    """What the devices have: all alike, or as a file says."""
    alike = Profile(**s.nodes.get(PROFILE, {}))
    if s["profiles"] is None:
        return alike
    own = from_file(s["profiles"])
    found: dict[int, dict[str, Any]] = {}
    for key, value in own.items():
        client, _, name = key.partition(".")
        if not client.isdigit() or name not in {f.name for f in fields(Profile)}:
            raise ValueError(f"{s['profiles']}: {key!r} is not like `0: {{memory_bytes: 4000000}}`")
        found.setdefault(int(client), {})[name] = value
    return {c: Profile(**{**vars(alike), **given}) for c, given in found.items()}


def stop(s: Settings) -> Stop:
    """When the run ends early.  A bare number as the target is an accuracy."""
    target = s["target"]
    if isinstance(target, int | float):
        target = f"accuracy>={target:g}"
    try:
        return Stop(target, s["comm_threshold_mb"], s["seconds"], s["patience"])
    except ValueError as error:
        raise ValueError(str(error).removeprefix("stop.")) from None
