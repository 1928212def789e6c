"""Weights from files: what loads, what is refused, and the published accuracies."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lilliput import data, models


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def forms(state):
    """The same weights as programs save them: file name to content."""
    return {
        "plain.pt": state,
        "wrapped.th": {"state_dict": state, "best_prec1": 91.0, "epoch": 3},
        "parallel.pth": {"state_dict": {f"module.{name}": x for name, x in state.items()}},
        "old.pt": {name: x for name, x in state.items() if not name.endswith("num_batches_tracked")},
        "safe.safetensors": state,
    }


@pytest.mark.parametrize("name", forms({}))
def test_weights_load_in_the_forms_that_programs_save(name, tmp_path):
    source, target = net(0), net(1)
    content = forms(source.state_dict())[name]
    if name.endswith(".safetensors"):
        save_file(content, tmp_path / name)
    else:
        torch.save(content, tmp_path / name)
    assert models.load_weights(target, tmp_path / name) is target
    assert all(torch.equal(x, y) for x, y in zip(source.parameters(), target.parameters(), strict=True))


class Tied(nn.Module):
    """Embedding and head are one tensor, as in GPT-2."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("left_out", [(), ("head.weight",), ("embedding.weight",)])
def test_other_names_of_a_tied_tensor_may_be_missing(left_out, tmp_path):
    state = {name: x for name, x in Tied(0).state_dict().items() if name not in left_out}
    torch.save(state, tmp_path / "tied.pt")
    model = models.load_weights(Tied(1), tmp_path / "tied.pt")
    assert torch.equal(model.head.weight, Tied(0).head.weight) and model.head.weight is model.embedding.weight


def test_two_values_of_a_tied_tensor_are_refused(tmp_path):
    state = {**Tied(0).state_dict(), "head.weight": torch.zeros(5, 3)}
    torch.save(state, tmp_path / "tied.pt")
    model = Tied(1)
    with pytest.raises(ValueError, match=r"'embedding.weight' and 'head.weight' are tied"):
        models.load_weights(model, tmp_path / "tied.pt")
    assert torch.equal(model.head.weight, Tied(1).head.weight)


def test_what_transformers_saves_of_a_tied_model_loads(tmp_path):
    pytest.importorskip("transformers")
    options = {"layers": 1, "hidden": 8, "heads": 2, "vocab_size": 20, "positions": 8}
    torch.manual_seed(0)
    source = models.pretrained("gpt2", **options)
    source.save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = models.load_weights(models.pretrained("gpt2", **options), tmp_path / "model.safetensors")
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in model.state_dict().items())


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_nothing_that_is_read_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"0.weight": Bomb()}, protocol=2))
    torch.save({"0.weight": Bomb()}, tmp_path / "zip.pt")
    for name in ("bomb.pt", "zip.pt"):
        with pytest.raises(ValueError, match="damaged or not a file of weights"):
            models.load_weights(net(0), tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_a_file_cut_short_is_refused(suffix, keep, tmp_path):
    path = tmp_path / f"net{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(net(0).state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(ValueError, match="is damaged or not a file of weights") as refusal:
        models.load_weights(net(1), path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no state dict"),
        ([torch.zeros(2)], "no state dict"),
        ({"lr": 0.1}, "no state dict"),
        ({"0.weight": torch.zeros(4, 3)}, r"lacks '0.bias' \(7 names missing, 0 unknown\)"),
        ({**net(0).state_dict(), "head": torch.zeros(1)}, "has 'head', which the model lacks"),
        ({**net(0).state_dict(), "2.bias": torch.zeros(3)}, r"'2.bias' has shape \(3,\), the model's \(2,\)"),
    ],
)
def test_foreign_weights_are_refused_and_change_nothing(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    model = net(1)
    with pytest.raises(ValueError, match=message):
        models.load_weights(model, tmp_path / "other.pt")
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), net(1).parameters(), strict=True))


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"no weights file 'nowhere.pt'"):
        models.load_weights(net(0), "nowhere.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "right"), [("resnet20", "resnet20-12fca82f.th", 9173), ("resnet56", "resnet56-4bfd9763.th", 9339)]
)
def test_published_checkpoints_score_as_published(name, file, right, shared):
    """8.27 % and 6.61 % test error: 9,173 and 9,339 of CIFAR-10's 10,000 test images, not one more or less."""
    model = models.build(name, shape=(3, 32, 32), classes=10).eval()
    models.load_weights(model, shared / "checkpoints" / "resnet-cifar10" / file)
    images, labels = data.load("cifar10", folder=shared / "data" / "cifar10").test
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        correct = sum(
            int((model((x / 255 - mean) / std).argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    assert correct == right
