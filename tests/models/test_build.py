"""Models by name and of a user's own: shapes, determinism, layouts, refusals."""

import ast
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import lilliput.models
from lilliput import models
from lilliput.models.transformers import NAMES

TEXT = {"char_lm", "char_lstm"}
DEEP = {"resnet50", "resnet110", "resnet1202"}
NAMED = set(models.names()) - set(NAMES) - {"pretrained"}  # those of transformers have a file of tests to themselves
IMAGE = sorted(NAMED - TEXT - DEEP)


def make(name, seed=0, **options):
    torch.manual_seed(seed)
    return models.build(name, shape=(12,) if name in TEXT else (3, 16, 16), classes=7, **options)


@pytest.mark.parametrize("name", sorted(NAMED - DEEP))
def test_logits_have_one_row_per_example_or_position(name):
    model = make(name).eval()
    if name in TEXT:
        assert model(torch.randint(0, 7, (2, 12))).shape == (2, 12, 7)
        assert model(torch.randint(0, 7, (2, 5))).shape == (2, 5, 7)
    else:
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)


@pytest.mark.parametrize("name", sorted(NAMED - DEEP))
def test_the_seed_alone_decides_the_weights(name):
    one, again, other = (make(name, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_bottlenecks_learn():
    model = make("resnet50", width=8)
    assert model.layer4[2].conv3.out_channels == 8 * 8 * 4
    F.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.randint(0, 7, (4,))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", IMAGE)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_layout_of_a_batch_changes_nothing(name, channels):
    torch.manual_seed(0)
    model = models.build(name, shape=(channels, 16, 16), classes=7).eval()
    x = torch.randn(4, 16, 16, channels).permute(0, 3, 1, 2)
    torch.testing.assert_close(model(x), model(x.contiguous()), rtol=1e-5, atol=1e-5)
    weights_too = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(weights_too(x), model(x.contiguous()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["cnn", "resnet10", "resnet20"])
def test_images_flow_channels_last(name, channels):
    model = models.build(name, shape=(channels, 32, 32), classes=7)
    seen = []
    for part in ("conv1", "conv2" if name == "cnn" else "layer2"):
        getattr(model, part).register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    model(torch.randn(4, channels, 32, 32))
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in seen)


def test_the_cnn_is_the_papers_order_of_layers():
    model, x = make("cnn"), torch.randn(3, 3, 16, 16)
    h = F.max_pool2d(F.relu(F.conv2d(x, model.conv1.weight, model.conv1.bias, padding=2)), 2)
    h = F.max_pool2d(F.relu(F.conv2d(h, model.conv2.weight, model.conv2.bias, padding=2)), 2)
    h = F.relu(F.linear(h.flatten(1), model.fc1.weight, model.fc1.bias))
    torch.testing.assert_close(model(x), F.linear(h, model.fc2.weight, model.fc2.bias), rtol=1e-5, atol=1e-6)


def test_shortcuts_of_option_a_subsample_and_pad():
    block = make("resnet20", width=4).layer2[0].eval()
    torch.nn.init.zeros_(block.conv2.weight)  # bn2 then gives 0: the shortcut alone remains
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    expected[:, 2:6] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("name", sorted(TEXT))
def test_no_character_sees_the_future(name):
    model = make(name)
    x = torch.randint(0, 7, (2, 12))
    changed = x.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 7
    a, b = model(x), model(changed)
    torch.testing.assert_close(a[:, :8], b[:, :8])
    assert not torch.allclose(a[:, 8:], b[:, 8:])


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_group_norm_leaves_no_buffers(name):
    model = make(name, norm="group", groups=4)
    assert not list(model.buffers())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) > 5
    assert {m.num_groups for m in norms} == {4}


def test_resnet_names_are_those_of_torchvision():
    names = set(make("resnet18").state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight"} <= names
    assert {"layer2.0.downsample.1.running_mean", "layer4.1.bn2.bias", "fc.weight", "fc.bias"} <= names
    assert not any("shortcut" in name or "stem" in name for name in names)
    assert len(names) == 122


OWN = """
import torch
class Net(torch.nn.Linear):
    def __init__(self, classes, width=5):
        super().__init__(width, classes)
def everything(**options):
    return Net(options["classes"], options.pop("shape")[0])
bare = torch.nn.Linear(2, 3)
number = 3
def wrong():
    return 3
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    return lambda name, **options: models.build(f"{tmp_path / 'mine.py'}:{name}", shape=(4,), classes=3, **options)


def test_a_model_of_ones_own_gets_what_its_signature_asks_for(own):
    assert own("Net").weight.shape == (3, 5)
    assert own("Net", width=2).weight.shape == (3, 2)
    assert own("everything").weight.shape == (3, 4)
    assert own("bare").weight.shape == (3, 2)
    assert models.build("torch.nn:Identity", shape=(1,), classes=2)(3) == 3


def test_what_is_no_model_is_refused(own):
    with pytest.raises(ValueError, match="is of type int; name a class, a function or a module"):
        own("number")
    with pytest.raises(ValueError, match="of type int; it must make"):
        own("wrong")
    with pytest.raises(ValueError, match="no option 'widht'; did you mean 'width'"):
        own("Net", widht=3)
    with pytest.raises(ValueError, match="no option 'width'; there are none"):
        own("bare", width=3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet21", {}, "unknown model 'resnet21'; did you mean 'resnet"),
        ("mlp", {"hiden": (3,)}, "did you mean 'hidden'"),
        ("resnet18", {"blocks": (1, 1)}, "no option 'blocks'"),
        ("cnn", {"shape": (64,)}, r"takes images \(channels, height, width\), not shape \(64,\); try mlp"),
        ("cnn_pfl", {"shape": (1, 4, 4)}, "at least 6 x 6 pixels, not 4 x 4"),
        ("resnet18", {"norm": "layer"}, "choose batch or group"),
        ("resnet18", {"norm": "group", "groups": 3}, "64 channels do not divide into groups=3"),
        ("resnet18", {"stem": "tiny"}, "choose imagenet or cifar"),
        ("char_lm", {}, r"takes texts \(length,\)"),
        ("char_lstm", {}, r"takes texts \(length,\)"),
        ("char_lm", {"shape": (8,), "heads": 3}, "does not divide into heads=3"),
    ],
)
def test_refusals_name_the_value_and_the_remedy(name, arguments, message):
    with pytest.raises(ValueError, match=message) as refusal:
        models.build(name, **{"shape": (3, 32, 32), "classes": 10, **arguments})
    assert "\n" not in str(refusal.value)


def test_a_text_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="13 characters exceeds the 12 positions"):
        make("char_lm")(torch.zeros(1, 13, dtype=torch.int64))


def test_models_know_nothing_of_the_rest():
    core = ("lilliput.core.layers", "lilliput.core.registry", "lilliput.core.sources")
    known = (*core, "lilliput.lean", "lilliput.models.")
    below = {"wire"}  # which reads the best model of a run
    for path in Path(lilliput.models.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lilliput"):
                named = {alias.name for alias in node.names}
                assert node.module.startswith(known) or (node.module == "lilliput" and named <= below), path.name
