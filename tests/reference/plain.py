"""Federated training in plain torch, with nothing of lilliput: what every product of settings is compared with.

Optimizers are those of torch.optim, gradients come from an ordinary `.backward()`, each client trains a fresh copy of
the first model, and everything is written out for one process.  `s` holds the settings by their names in `Training`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def optimizer(params: list[Tensor], s: dict[str, Any], lr: float) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": lr, "weight_decay": s["weight_decay"]}
    if s["optimizer"] == "sgd":
        options |= {key: s[key] for key in ("momentum", "dampening", "nesterov")}
    else:
        options["eps"] = s["eps"]
    make = OPTIMIZERS.get(s["optimizer"]) or getattr(torch.optim, s["optimizer"])
    return make(params, **options)


def lr_at(s: dict[str, Any], number: int) -> float:
    """The learning rate of a round, from 1: a warm-up in even steps, then the schedule over the rounds after it."""
    rise = s["warmup"]
    done = max(number - rise, 1) - 1
    name, *arguments = s["schedule"].split(":")
    factor = {
        "constant": lambda: 1.0,
        "linear": lambda: 1 - done / max(s["rounds"] - rise, 1),
        "cosine": lambda: 0.5 * (1 + math.cos(math.pi * done / max(s["rounds"] - rise, 1))),
        "exponential": lambda: float(arguments[0]) ** done,
    }[name]()
    return s["lr"] * min(1.0, number / (rise + 1)) * factor


def mean_loss(net: nn.Module, x: Tensor, y: Tensor, s: dict[str, Any]) -> Tensor:
    with contextlib.ExitStack() as stack:
        if s["precision"] != "float32":
            stack.enter_context(torch.autocast("cpu", {"bf16": torch.bfloat16, "fp16": torch.float16}[s["precision"]]))
        return F.cross_entropy(net(x).flatten(0, -2), y.flatten())


def backward(net: nn.Module, x: Tensor, y: Tensor, s: dict[str, Any], scaler: Any) -> None:
    """Gradients of the mean over the batch's labels that count, by micro-batches."""
    total = int((y != IGNORED).sum())
    for part_x, part_y in zip(x.chunk(s["accumulate"]), y.chunk(s["accumulate"]), strict=True):
        n = int((part_y != IGNORED).sum())
        if n:
            loss = mean_loss(net, part_x, part_y, s) * (n / total)
            (scaler.scale(loss) if scaler else loss).backward()


def clip(params: list[Tensor], s: dict[str, Any]) -> None:
    with_grad = [p for p in params if p.grad is not None]
    for some in [[p] for p in with_grad] if s["per_layer"] else [with_grad]:
        if some:
            norm = torch.sqrt(sum(p.grad.double().square().sum() for p in some))
            for p in some:
                p.grad.mul_((s["clip"] / (norm + 1e-6)).clamp(max=1.0))


def take_step(net: nn.Module, params: list[Tensor], x: Tensor, y: Tensor, s: dict[str, Any], opt: Any, scaler: Any,
              add: dict[str, Any], first: bool) -> bool:  # fmt: skip
    """One step; whether it was applied.  Under fp16 the first step is repeated at half the scale until it does."""
    before = {n: b.clone() for n, b in net.named_buffers()}
    while True:
        opt.zero_grad()
        backward(net, x, y, s, scaler)
        if scaler:
            scaler.unscale_(opt)
        fine = all(p.grad.isfinite().all() for p in params if p.grad is not None)
        if fine or not scaler:
            correct(net, add)
            if s["clip"] is not None:
                clip(params, s)
        (scaler.step if scaler else lambda o: o.step())(opt)
        if scaler:
            scaler.update()
        if fine or not first or not scaler:
            return bool(fine) or not scaler
        for n, b in net.named_buffers():
            b.copy_(before[n])


def correct(net: nn.Module, add: dict[str, Any]) -> None:
    """FedProx's pull mu (w - x) and SCAFFOLD's c - c_i are terms of every parameter's gradient."""
    for n, p in net.named_parameters():
        if p.requires_grad and (add.get("mu") or "shift" in add):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if add.get("mu"):
                p.grad += add["mu"] * (p.detach() - add["x"][n])
            if "shift" in add:
                p.grad += add["shift"][n]


def normalise_by_the_batch(net: nn.Module) -> None:
    for m in net.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.track_running_stats, m.running_mean, m.running_var = False, None, None
            m.num_batches_tracked = None


def weight_of_a_constant_gradient(steps: int, s: dict[str, Any]) -> float:
    """How far `steps` steps at lr 1 along a gradient of one go, without weight decay."""
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    opt = optimizer([p], {**s, "weight_decay": 0.0}, 1.0)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        opt.step()
    return -float(p)


def train(first: nn.Module, x: dict[str, Tensor], buffers: dict[str, Tensor], data: list[Any], s: dict[str, Any],
          lr: float, kept: dict[str, Any], add: dict[str, Any]) -> tuple[nn.Module, int]:  # fmt: skip
    """A client's round: (model after, steps applied).  `kept` is what it remembers, and is written to."""
    net = copy.deepcopy(first).train()
    net.load_state_dict({**x, **buffers}, strict=False)
    if s["buffers"] == "none":
        normalise_by_the_batch(net)
    params = [p for p in net.parameters() if p.requires_grad]
    opt, steps = optimizer(params, s, lr), 0
    if "opt" in kept:
        opt.load_state_dict(copy.deepcopy(kept["opt"]))
        for group in opt.param_groups:
            group["lr"] = lr
    scaler = kept.setdefault("scaler", torch.amp.GradScaler("cpu")) if s["precision"] == "fp16" else None
    passes = s["local_epochs"] if s["local_steps"] is None else s["local_steps"]
    for batch_x, batch_y in (data * passes)[: s["local_steps"]]:
        if (batch_y != IGNORED).any():
            steps += take_step(net, params, batch_x, batch_y, s, opt, scaler, add, first=not steps)
    if s["optimizer_state"] == "keep":
        kept["opt"] = opt.state_dict()
    return net, steps


def run(first: nn.Module, data: dict[int, list[Any]], cohorts: list[list[int]], s: dict[str, Any]) -> dict[str, Tensor]:
    """The server's parameters, and its buffers where they are averaged, after all rounds."""
    x = {n: p.detach().clone() for n, p in first.named_parameters() if p.requires_grad}
    persistent = first.state_dict()
    start = {n: b.clone() for n, b in first.named_buffers() if n in persistent}
    buffers = dict(start)
    own: dict[int, dict[str, Tensor]] = {c: start for c in data}
    kept: dict[int, dict[str, Any]] = {c: {} for c in data}
    control = {n: torch.zeros_like(p) for n, p in x.items()}
    controls = {c: control for c in data}
    for number, cohort in enumerate(cohorts, 1):
        lr, found = lr_at(s, number), []
        for c in cohort:
            begin = {"average": buffers, "local": own[c], "none": start}[s["buffers"]]
            add: dict[str, Any] = {"mu": s["mu"], "x": x} if s["method"] == "fedprox" else {}
            if s["method"] == "scaffold":
                add["shift"] = {n: control[n] - controls[c][n] for n in x}
            net, steps = train(first, x, begin, data[c], s, lr, kept[c], add)
            after = {n: b.clone() for n, b in net.named_buffers() if n in start}
            own[c] = after
            delta = {n: p.detach() - x[n] for n, p in net.named_parameters() if n in x}
            a = weight_of_a_constant_gradient(steps, s) if s["method"] in ("fednova", "scaffold") else 1.0
            found.append((c, sum(int((y != IGNORED).sum()) for _, y in data[c]), delta, after, a))
        total = sum(n for _, n, *_ in found) or 1  # if no label counts, nothing moves
        if s["buffers"] == "average":
            for name, b in buffers.items():
                mean = sum(n * (after[name].double() - b.double()) for _, n, _, after, _ in found) / total
                buffers = {**buffers, name: b + mean.to(b.dtype)}  # of whole numbers the whole part
        if s["method"] == "scaffold":
            moved = {n: sum(d[n] for _, _, d, _, _ in found) / len(found) for n in x}
            learnt = {c: {n: -d[n] / (a * lr) - control[n] if a else 0 * d[n] for n in x} for c, _, d, _, a in found}
            controls |= {c: {n: controls[c][n] + u[n] for n in x} for c, u in learnt.items()}
            control = {n: control[n] + sum(u[n] for u in learnt.values()) / len(data) for n in x}
        elif s["method"] == "fednova":
            tau = sum(n / total * a for _, n, _, _, a in found)
            moved = {k: tau * sum(n / total * d[k] / a for _, n, d, _, a in found if a) + 0 * x[k] for k in x}
        else:
            moved = {k: sum(n / total * d[k] for _, n, d, _, _ in found) for k in x}
        x = {n: p + moved[n] for n, p in x.items()}
    return {**x, **(buffers if s["buffers"] == "average" else {})}
