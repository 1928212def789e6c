"""One factory makes the optimizers of `run`, `pretrain` and `memory`; what cannot be made is refused early."""

import pytest
import torch
from torch import nn

from lilliput import Experiment
from lilliput.algorithms import FedAvg
from lilliput.cli import main
from lilliput.core.fleet import Client, Profile
from lilliput.data.batches import as_batches
from lilliput.footprint import Setting
from lilliput.optim import factory as optimizers
from lilliput.pretraining.config import Pretrain
from lilliput.pretraining.optimizers import build
from lilliput.tasks import Supervised
from lilliput.training import updates
from lilliput.training.fit import fit
from lilliput.training.settings import Training

PLAIN = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False}


class Words(nn.Module):
    """An embedding, a layer, and an output head as models of transformers name it."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(20, 12), nn.Linear(12, 10), nn.Linear(10, 20)

    def forward(self, x):
        return self.head(self.layer(self.embedding(x)).tanh())

    def get_output_embeddings(self):
        return self.head


def made(optimizer, model=None, lr=0.1, **given):
    model = model or nn.Linear(12, 10)
    update = updates.make(
        optimizer, list(model.parameters()), lr, model=model, **{**PLAIN, "options": {}, **given},
    )  # fmt: skip
    return getattr(update, "_optimizer", update)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "galore_adamw8bit", torch.optim.AdamW, "torch.optim:AdamW"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_weight_decay_is_what_is_given_whatever_a_class_prefers(optimizer, decay):
    assert {g["weight_decay"] for g in made(optimizer, weight_decay=decay).param_groups} == {decay}


def test_a_decay_of_the_options_goes_before_that_of_the_method():
    assert made(torch.optim.AdamW, options={"weight_decay": 0.2}).param_groups[0]["weight_decay"] == 0.2


@pytest.mark.parametrize("optimizer", [name for name in optimizers.OPTIMIZERS if name not in updates.LISTS])
def test_run_and_pretrain_make_the_same(optimizer):
    """Same groups, same options, in the same order."""
    options = {"rank": 4} if optimizers.projects(optimizer) and optimizer != "apollo_mini" else {}
    model = Words()
    one = made(optimizer, model, options=options)
    other = build(model, Pretrain(optimizer=optimizer, optimizer_options=options, lr=0.1))
    assert type(one) is type(other) and len(one.param_groups) == len(other.param_groups)
    for a, b in zip(one.param_groups, other.param_groups, strict=True):
        assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


def test_embeddings_and_head_are_not_projected_in_a_run():
    model = Words()
    groups = made("galore_adamw", model, options={"rank": 4}).param_groups
    assert [[n for g in groups if "rank" in g for n in g["names"]], len(groups)] == [["layer.weight"], 2]


def test_a_part_without_a_layer_of_that_size_trains_in_full():
    assert all("rank" not in g for g in made("galore_adamw", nn.Linear(3, 3)).param_groups)


def test_convolutions_are_projected():
    groups = made("galore_adamw", nn.Sequential(nn.Conv2d(8, 8, 3)), options={"rank": 4}).param_groups
    assert groups[0]["names"] == ["0.weight"]


def test_online_pca_follows_the_schedule():
    """Its rate is lr / peak / gap: half as large where the schedule halved lr."""
    group = made("online_subspace_adamw", Words(), lr=0.05, peak=0.1, options={"rank": 4}).param_groups[0]
    assert (group["lr"], group["base_lr"]) == (0.05, 0.1)


def test_online_pca_follows_the_schedule_of_a_run():
    """A projection that takes plain gradient steps is linear in the factor of the schedule: 1, 1/2, 1/4."""
    model, data = Words(), [(torch.arange(6), torch.arange(6) + i) for i in range(2)]
    options = {"rank": 4, "proj_type": "continuous_sgd", "update_proj_gap": 2}
    config = Training(
        lr=1e-6, schedule="exponential:0.5", optimizer="online_subspace_adamw", optimizer_options=options,
        optimizer_state="average",
    )  # fmt: skip
    found = []
    for number in (1, 2, 3):
        client = Client(0, Supervised(model), as_batches(data), Profile(), round=number, rounds=3, seed=0)
        (P,) = fit(client, client.task.init()["params"], config=config)[2].projections.values()
        found.append(P.double())
    assert (found[0] - found[1]).abs().max() > 1e-4
    torch.testing.assert_close(found[0] - found[1], 2 * (found[1] - found[2]), atol=1e-6, rtol=1e-3)


def test_adafactor_that_follows_the_step_count_needs_no_rate():
    assert made("adafactor", options={"relative_step": True}).param_groups[0]["relative_step"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adam", "momentum": 0.9}, "momentum is SGD's"),
        ({"optimizer": "adamv"}, "unknown optimizer 'adamv'; did you mean 'adam"),
        ({"optimizer": "galore_adamw", "optimizer_options": {"update_proj_gab": 2}}, "did you mean 'update_proj_gap'"),
        ({"optimizer_options": {"dampning": 0.5}}, "optimizer sgd has no option 'dampning'; did you mean 'dampening'"),
        ({"optimizer": torch.optim.AdamW, "optimizer_options": {"epz": 1.0}}, "optimizer AdamW has no option 'epz'"),
        ({"optimizer": torch.optim.LBFGS, "weight_decay": 0.1}, "optimizer LBFGS has no weight_decay, which is 0.1"),
    ],
)
@pytest.mark.parametrize("method", [Training, FedAvg])
def test_what_cannot_be_made_is_refused_at_construction(method, settings, words):
    with pytest.raises(ValueError, match=words):
        method(**settings)


OURS = ["adam", "adamw", "adamw8bit", "lion", "galore_adamw", "online_subspace_lion", "fira"]


@pytest.mark.parametrize("settings", [Training, FedAvg, Pretrain, Setting])
@pytest.mark.parametrize(
    ("optimizers", "options", "words"),
    [
        (OURS, {"betas": (0.9, 1.5)}, "betas.*1.5"),
        (OURS, {"betas": (-0.1, 0.9)}, "betas.*-0.1"),
        (OURS, {"betas": 0.9}, "betas|cannot be made with"),
        (OURS, {"weight_decay": -0.1}, "weight_decay.*-0.1"),
        (["adam", "adamw", "adamw8bit", "adafactor", "fira"], {"eps": -1e-8}, "eps.*-1e-08"),
        (["adafactor"], {"beta1": 1.0}, "beta1 hold 1.0"),
        (["galore_adamw", "apollo"], {"rank": "8"}, "rank '8' is no whole number above 0"),
        (["galore_adamw", "apollo"], {"update_proj_gap": 0}, "update_proj_gap 0 is no whole number"),
        (["galore_adamw", "apollo"], {"scale": -1}, "scale is -1: give a number above 0"),
        (["galore_adamw", "apollo"], {"proj_type": "stdd"}, "proj_type 'stdd' is unknown.*did you mean 'std'"),
        (["galore_lion", "online_subspace_lion"], {"update": "apollo"}, "update 'apollo' does nothing to a sign"),
        (["lion", "galore_lion"], {"states": "4bit"}, "states '4bit' is unknown"),
        (["torch.optim:RMSprop", torch.optim.RMSprop], {"alpha": -1.0}, "RMSprop cannot be made with .* alpha"),
        (["torch.optim:NAdam", torch.optim.NAdam], {"betas": (0.9, 1.5)}, "NAdam cannot be made with .* beta"),
    ],
)
def test_what_nothing_can_be_trained_with_is_refused_at_construction(settings, optimizers, options, words):
    for optimizer in optimizers:
        if isinstance(optimizer, str) or settings is not Setting:  # in a setting, a class is a function of the module
            with pytest.raises(ValueError, match=words):
                settings(optimizer=optimizer, optimizer_options=options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rank": 4, "targets": "lair"}, "no layer of Words has 'lair' in its name; did you mean 'layer'"),
     ({"rank": 64}, "has both sides longer than rank 64; lower the rank"), ({}, "longer than rank 128")],
)  # fmt: skip
def test_a_run_of_a_model_of_which_nothing_would_be_projected_is_refused(options, words):
    data = {0: [(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))]}
    method = FedAvg(optimizer="galore_adamw", optimizer_options=options)
    with pytest.raises(ValueError, match=words):
        Experiment(method, Supervised(Words()), data, rounds=1)


def test_what_cannot_be_made_is_refused_by_name_by_the_command_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for words in (["run", "optimizer=adam", "momentum=0.9"], ["pretrain", "optimizer=lion", "optimizer.rank=4"]):
        assert main(words) != 0
        assert "momentum is SGD's" in (said := capsys.readouterr().err) or "lion has no option 'rank'" in said
        assert list(tmp_path.iterdir()) == []
