"""What cannot be trained is refused in one line that names the value, the rule and the remedy."""

import pytest
import torch
from torch import nn

from lilliput import optim


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


def group(**options):
    return [{"params": [weight(8, 6)], "rank": 2, **options}]


@pytest.mark.parametrize(
    ("groups", "options", "words"),
    [
        (group(rank=7), {}, r"rank 7 exceeds min.* = 6 .*choose rank <= 6"),
        (group(rank=0), {}, "rank 0 is no whole number"),
        (group(proj_type="contnuous"), {}, "did you mean 'continuous'"),
        (group(update="fiera"), {}, "did you mean 'fira'"),
        (group(refresh="qr"), {}, "refresh 'qr' is unknown"),
        (group(update_proj_gap=0), {}, "update_proj_gap 0"),
        (group(lazy=1.5), {}, "lazy 1.5"),
        (group(scale=-1.0), {}, r"scale is -1\.0"),
        ([{"params": [weight(8)], "rank": 2}], {}, r"shape \(8,\).*projects matrices"),
        (group(), {"lr": 0.0}, "lr is 0.0.*scheduler"),
        (group(), {"lr": None}, "lr is None"),
        (group(), {"states": "4bit"}, "states '4bit' is unknown"),
        (group(), {"compat": "oficial"}, "did you mean 'official'"),
    ],
)
def test_impossible_groups_are_refused(groups, options, words):
    with pytest.raises(ValueError, match=words):
        optim.GaLoreAdamW(groups, **options)


@pytest.mark.parametrize(
    ("groups", "options", "words"),
    [
        (group(update_proj_gab=3), {}, "no option 'update_proj_gab'; did you mean 'update_proj_gap'"),
        (group(rank="8"), {}, "rank '8' is no whole number"),
        ([weight(8, 6)], {"rank": "8"}, "rank '8' is no whole number"),
        (group(), {"betas": (0.9, 1.0)}, "betas hold 1.0: give numbers from 0 to below 1"),
        (group(betas=(-0.1, 0.9)), {}, "betas hold -0.1"),
        (group(), {"eps": -1e-8}, "eps is -1e-08: give a number that is not negative"),
        (group(), {"weight_decay": -0.1}, "weight_decay is -0.1"),
        (torch.nn.Linear(8, 6), {"rank": 2}, r"a Linear is a model; give optim.param_groups\(model, rank\)"),
    ],
)
def test_what_would_train_something_else_is_refused(groups, options, words):
    with pytest.raises(ValueError, match=words):
        optim.GaLoreAdamW(groups, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 2, "update_proj_gab": 3}, "did you mean 'update_proj_gap'"),
        ({"rank": "2"}, "rank '2' is no whole number"),
        ({"rank": 2, "targets": ["attn", "mpl"]}, "no layer of ModuleDict has 'mpl' in its name; did you mean 'mlp'"),
        ({"rank": 2, "targets": "all-lineer"}, "did you mean 'all-linear'"),
    ],
)
def test_misspelt_groups_are_refused(arguments, words):
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(8, 6), "mlp": torch.nn.Linear(6, 8)})
    with pytest.raises(ValueError, match=words):
        optim.param_groups(model, **arguments)


def test_groups_of_parameters_alone_are_refused():
    with pytest.raises(ValueError, match="reads a model's layers, not a list"):
        optim.param_groups(list(torch.nn.Linear(8, 6).parameters()), 2)


def test_a_rank_for_parameters_alone_says_what_it_projects():
    model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 6))
    with pytest.warns(UserWarning, match=r"projects all 2 matrices.*the largest is \(50, 8\).*param_groups"):
        optim.GaLoreAdamW(model.parameters(), rank=4)


def test_labels_and_what_schedulers_write_may_stand_in_a_group():
    optim.GaLoreAdamW(group(name="decoder", initial_lr=0.1, lr_scale=2.0))


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match=r"update_gap.*takes rank, update_proj_gap"):
        optim.GaLoreAdamW(group(), update_gap=3)


def test_scaling_by_channels_does_nothing_to_a_sign():
    with pytest.raises(ValueError, match="does nothing to a sign"):
        optim.GaLoreLion(group(update="apollo"))


def test_plain_lion_projects_nothing():
    with pytest.raises(ValueError, match="use GaLoreLion"):
        optim.Lion(group())


def test_adafactor_takes_a_rate_or_the_step_count():
    with pytest.raises(ValueError, match="lr is None"):
        optim.GaLoreAdafactor(group())
    with pytest.raises(ValueError, match="exclude each other"):
        optim.GaLoreAdafactor(group(), lr=0.1, relative_step=True)
    optim.GaLoreAdafactor(group(), relative_step=True)


def test_an_assigned_projection_of_the_wrong_shape_is_refused():
    p = weight(8, 6)
    optimizer = optim.GaLoreAdamW([{"params": [p], "rank": 2}])
    optimizer.state[p]["P"] = torch.eye(3, 6)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"P of shape \(3, 6\) was assigned to a 8 x 6 matrix.*needs \(2, 6\)"):
        optimizer.step()


def test_sparse_gradients_are_refused():
    p = weight(8, 6)
    optimizer = optim.GaLoreAdamW([p])
    p.grad = torch.ones(8, 6).to_sparse()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step()


def test_gradients_elsewhere_than_their_weight_are_refused():
    p = weight(8, 6)
    optimizer = optim.GaLoreAdamW([p], rank=2)
    with pytest.raises(ValueError, match="weight on cpu is sparse or on meta"):
        optimizer.update([p], [torch.empty(8, 6, device="meta")], optimizer.param_groups[0])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda p: optim.GaLoreLion([{"params": [p], "rank": 2}]), "rule='lion'"),
        (lambda p: optim.GaLoreAdamW([{"params": [p], "rank": 3}]), "rank=3"),
        (lambda p: optim.GaLoreAdamW8bit([{"params": [p], "rank": 2}]), "states='8bit'"),
        (lambda p: optim.GaLoreAdamW([{"params": [p, weight(4, 4)], "rank": 2}]), "another model"),
        (lambda p: optim.GaLoreAdamW([{"params": [weight(8, 7)], "rank": 2}]), "another model or optimizer"),
    ],
)
def test_foreign_checkpoints_are_refused_and_change_nothing(other, words):
    p = weight(8, 6)
    optimizer = optim.GaLoreAdamW([{"params": [p], "rank": 2}])
    foreign = other(p)
    for made in (optimizer, foreign):
        for q in (q for g in made.param_groups for q in g["params"]):
            q.grad = torch.ones_like(q)
        made.step()
    before = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(foreign.state_dict())
    assert all(torch.equal(before[k], optimizer.state[p][k]) for k in before)
