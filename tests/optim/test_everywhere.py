"""The places where people use an optimizer: mixed precision, compiled models, transformers, and federated training."""

import pytest
import torch
from torch import nn

import lilliput
from lilliput import optim
from lilliput.algorithms import FedAvg
from lilliput.tasks import Supervised


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(seed=0, size=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 12, generator=generator), torch.randint(0, 4, (size,), generator=generator)


def test_scaled_mixed_precision_is_the_plain_step_and_skips_overflows():
    plain, scaled = model(), model()
    optimizers = [optim.GaLoreAdamW(optim.param_groups(m, rank=3), lr=0.01) for m in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        x, y = batch(step)
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizers[0].step()
        scaler.scale(nn.functional.cross_entropy(scaled(x), y)).backward()
        scaler.step(optimizers[1])
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=0)
    before = [p.detach().clone() for p in scaled.parameters()]
    scaler.scale(nn.functional.cross_entropy(scaled(x * float("inf")), y)).backward()
    scaler.step(optimizers[1])
    assert all(torch.equal(p, q) for p, q in zip(before, scaled.parameters(), strict=True))


def test_compiled_models_train_as_plain_ones():
    plain, compiled = model(), torch.compile(model(), backend="eager")
    ends = []
    for m in (plain, compiled):
        optimizer = optim.GaLoreAdamW(optim.param_groups(m, rank=3), lr=0.01)
        for step in range(3):
            x, y = batch(step)
            nn.functional.cross_entropy(m(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in m.parameters()])
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


class Classifier(nn.Module):
    """A model as transformers' Trainer wants it: a dict with a loss."""

    def __init__(self):
        super().__init__()
        self.body = model()

    def forward(self, x, labels):
        logits = self.body(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_transformers_trainer_runs_and_resumes(way, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install lilliput[hf]")
    pytest.importorskip("accelerate")
    x, y = batch(size=32)
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def trainer(steps):
        net = Classifier()
        groups = optim.param_groups(net, rank=3, update_proj_gap=2, proj_type="continuous")
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=8, save_steps=3, report_to=[], use_cpu=True,
            logging_strategy="no", disable_tqdm=True, lr_scheduler_type="constant", seed=1,
        )  # fmt: skip
        if way == "optimizer_cls_and_kwargs":
            chosen = {way: (optim.GaLoreAdamW, {"params": groups, "lr": 0.01})}
        else:
            optimizer = optim.GaLoreAdamW(groups, lr=0.01)
            chosen = {way: (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))}
        return transformers.Trainer(net, arguments, train_dataset=data, **chosen)

    straight = trainer(6)
    straight.train()
    assert type(getattr(straight.optimizer, "optimizer", straight.optimizer)) is optim.GaLoreAdamW
    resumed = trainer(6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    pairs = zip(straight.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    assert not all(
        torch.equal(p, q) for p, q in zip(straight.model.parameters(), Classifier().parameters(), strict=True)
    )


def federation(**options):
    data = {c: [batch(10 * c + i) for i in range(3)] for c in range(4)}
    method = FedAvg(lr=0.01, optimizer=options.pop("optimizer"), optimizer_options=options.pop("options"), **options)
    task = Supervised(model(), nn.functional.cross_entropy)
    return lilliput.Experiment(method, task, data=data, rounds=4, seed=0)


@pytest.mark.parametrize("make", [optim.GaLoreAdamW, optim.GaLoreAdamW8bit, optim.GaLoreAdafactor, optim.GaLoreLion])
@pytest.mark.parametrize("kept", ["reset", "keep"])
def test_federated_methods_train_with_it(make, kept):
    options = {"rank": 3, "update_proj_gap": 2, "proj_type": "continuous"}
    history = federation(optimizer=make, options=options, optimizer_state=kept).run("sequential")
    losses = [row["train_loss"] for row in history.rows if "train_loss" in row]
    assert losses[-1] < losses[0]


def test_a_kept_optimizer_state_matters_and_hooks_do_not():
    ends = {}
    for name, options in {"reset": {}, "keep": {"optimizer_state": "keep"}, "hooks": {"per_layer": True}}.items():
        history = federation(optimizer=optim.GaLoreAdamW, options={"rank": 3}, **options).run("sequential")
        ends[name] = history.state["params"]
    assert all(torch.equal(ends["reset"][n], ends["hooks"][n]) for n in ends["reset"])
    assert any(not torch.equal(ends["reset"][n], ends["keep"][n]) for n in ends["reset"])
