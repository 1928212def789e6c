"""Parameter counts, against the published figures and against formulas written out here."""

import pytest
import torch

from lilliput import models

CIFAR = {"shape": (3, 32, 32), "classes": 10}


def count(name, shape=(3, 32, 32), classes=10, **options):
    with torch.device("meta"):  # counts need no memory
        model = models.build(name, shape=shape, classes=classes, **options)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet10", 4_910_922),  # the tiers of InCo's stage splitting
        ("resnet14", 10_812_234),
        ("resnet18", 11_181_642),
        ("resnet22", 17_082_954),
        ("resnet26", 17_452_362),
        ("resnet20", 269_722),  # the published checkpoints
        ("resnet56", 853_018),
    ],
)
def test_published_counts(name, parameters):
    assert count(name) == parameters


def test_torchvision_counts():
    assert count("resnet18", (3, 224, 224), 1000) == 11_689_512
    assert count("resnet50", (3, 224, 224), 1000) == 25_557_032


@pytest.mark.parametrize(("name", "blocks"), [("resnet32", 5), ("resnet44", 7), ("resnet110", 18), ("resnet1202", 200)])
def test_cifar_resnet_counts_follow_the_formula(name, blocks):
    stem, head = 3 * 16 * 9 + 2 * 16, 64 * 10 + 10
    first = [9 * i * o + 9 * o * o + 4 * o for i, o in ((16, 16), (16, 32), (32, 64))]
    others = [2 * 9 * o * o + 4 * o for o in (16, 32, 64)]
    assert count(name) == stem + sum(first) + (blocks - 1) * sum(others) + head


def test_the_kernel_is_that_of_every_convolution():
    few, many = (count("resnet20", width=4, kernel=kernel) for kernel in (3, 7))
    others = 2 * (4 + 6 * (4 + 8 + 16)) + 16 * 10 + 10  # norms and the head
    assert (few - others) * 49 == (many - others) * 9
    x = torch.randn(2, 3, 12, 12)
    model = models.build("resnet20", shape=(3, 12, 12), classes=10, width=4, kernel=7)
    assert model.layer3(model.layer2(model.layer1(model.conv1(x)))).shape == (2, 16, 3, 3)
    with pytest.raises(ValueError, match="kernel is 4; shortcuts need an odd one"):
        count("resnet20", kernel=4)


def test_width_divides_resnet26_as_published():
    millions = [round(count("resnet26", width=width) / 1e6, 2) for width in (64, 32, 16, 8, 4)]
    assert millions == [17.45, 4.37, 1.10, 0.28, 0.07]


def test_the_cifar_stem_replaces_49_weights_per_channel_by_9():
    assert count("resnet18", stem="cifar") == 11_181_642 - 64 * 3 * (49 - 9)


def test_small_models():
    assert count("mlp", (1, 28, 28)) == 199_210
    assert count("mlp", (5,), 2, hidden=(3,)) == 5 * 3 + 3 + 3 * 2 + 2
    assert count("cnn", (1, 28, 28)) == 1_663_370
    assert count("cnn") == (75 + 1) * 32 + (800 + 1) * 64 + (8 * 8 * 64 + 1) * 512 + 513 * 10 == 2_156_490
    assert count("cnn_pfl") == (27 + 1) * 32 + (288 + 1) * 64 + (14 * 14 * 64 + 1) * 128 + 129 * 10
    assert count("simple_conv", (3, 24, 24)) == 1_068_298
    assert count("simple_conv") == 76 * 64 + 1601 * 64 + (8 * 8 * 64 + 1) * 384 + 385 * 192 + 193 * 10


def test_text_models():
    h, layers, length, alphabet = 128, 4, 80, 90
    block = 4 * h + 3 * h * (h + 1) + h * (h + 1) + 4 * h * (h + 1) + h * (4 * h + 1)
    assert count("char_lm", (length,), alphabet) == 2 * alphabet * h + length * h + layers * block + 2 * h
    lstm = 4 * 256 * (8 + 256 + 2) + 4 * 256 * (256 + 256 + 2)
    assert count("char_lstm", (length,), alphabet) == 8 * alphabet + lstm + 257 * alphabet
