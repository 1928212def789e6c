"""InCo's mix: which layers are mixed with which, and what holds of each formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput import models
from lilliput.algorithms.inco import mix
from lilliput.submodel import COMBINES
from lilliput.submodel.inco import pairs

MODES = ("theorem", "algorithm1", "published", "normalised")
SHALLOW, DEEP = "layer1.0.conv2.weight", "layer1.1.conv1.weight"


def kernels(seed: int, scale: float = 0.01, ratio: float = 1.0) -> dict[str, torch.Tensor]:
    """Random changes of two layers of 6 kernels, the deep one's `ratio` times as large."""
    generator = torch.Generator().manual_seed(seed)
    shallow, deep = (scale * torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return {SHALLOW: shallow, DEEP: ratio * deep}


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The inner product of each kernel."""
    return (x * y).sum((2, 3))


many = given(st.integers(0, 10**6), st.sampled_from([0.05, 1.0, 20.0]))


def names(model: str, **options: object) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        built = models.build(model, shape=(3, 32, 32), classes=10, **options)
    return dict(built.named_parameters())


@pytest.mark.parametrize("model", ["resnet10", "resnet14", "resnet18", "resnet22", "resnet26"])
def test_every_later_convolution_of_a_stage_has_the_second_one_of_its_first_block(model: str) -> None:
    params = names(model)
    found = pairs(params)
    later = [n for n in params if ".conv" in n and n.split(".")[1] != "0"]
    assert found == {n: f"{n.split('.')[0]}.0.conv2.weight" for n in later}
    assert (model == "resnet10") == (not found)


def test_bottlenecks_and_pointwise_convolutions_have_shallow_ones_of_their_shape() -> None:
    params = names("resnet50")
    found = pairs(params)
    assert found["layer2.2.conv1.weight"] == "layer2.1.conv1.weight"  # block 0's has other inputs
    assert found["layer2.2.conv2.weight"] == "layer2.0.conv2.weight"
    assert found["layer2.2.conv3.weight"] == "layer2.0.conv3.weight"  # and not the shortcut, which has this shape too
    assert all(params[deep].shape == params[shallow].shape for deep, shallow in found.items())
    assert not [
        n for pair in found.items() for n in pair if "bn" in n or "downsample" in n or n.startswith(("fc", "c"))
    ]


def test_a_transformers_block_mixes_its_second_norm_and_on_request_its_matrices() -> None:
    with torch.device("meta"):
        params = dict(models.build("char_lm", shape=(16,), classes=30, layers=3).named_parameters())
    assert pairs(params) == {f"blocks.{i}.norm2.weight": f"blocks.{i}.norm1.weight" for i in range(3)}
    more = pairs(params, matrices=True)
    assert more["blocks.2.qkv.weight"] == "blocks.0.qkv.weight" and len(more) == 3 + 2 * 4
    vit = {f"vit.encoder.layer.1.{n}.weight": torch.ones(4) for n in ("layernorm_before", "layernorm_after")}
    assert pairs(vit) == {"vit.encoder.layer.1.layernorm_after.weight": "vit.encoder.layer.1.layernorm_before.weight"}


@settings(max_examples=60, deadline=None)
@many
def test_the_theorem_never_opposes_either_change_and_moves_least(seed: int, ratio: float) -> None:
    deltas = kernels(seed, ratio=ratio)
    x = mix(deltas, "theorem")[DEEP]
    g0, g, slack = deltas[SHALLOW], deltas[DEEP], 1e-15
    assert (products(x, g0) >= -slack).all() and (products(x, g) >= -slack).all()
    agrees = products(g, g0) >= 0
    assert torch.equal(x[agrees], g[agrees])
    torch.testing.assert_close(mix({**deltas, DEEP: x}, "theorem")[DEEP], x, rtol=1e-9, atol=1e-15)
    # The nearest point of a half-space is on its border, in the direction of its normal.
    along = (x - g).flatten(2) / g0.flatten(2)
    assert torch.allclose(along, along[..., :1].expand_as(along), rtol=1e-6, atol=1e-9)
    assert np.allclose(products(x, g0)[~agrees], 0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@many
def test_the_normalised_mix_never_opposes_either_change(seed: int, ratio: float) -> None:
    deltas = kernels(seed, ratio=ratio)
    x = mix(deltas, "normalised")[DEEP]
    assert (products(x, deltas[SHALLOW]) >= -1e-15).all() and (products(x, deltas[DEEP]) >= -1e-15).all()


def test_the_published_mix_may_oppose_both_but_not_the_deep_change_below_a_ceiling_of_one() -> None:
    opposed = {"deep": 0, "shallow": 0, "deep, ceiling 1": 0}
    for seed in range(50):
        for ratio in (0.05, 20.0):
            deltas = kernels(seed, scale=1e-4, ratio=ratio)
            x = mix(deltas)[DEEP]
            opposed["deep"] += int((products(x, deltas[DEEP]) < 0).sum())
            opposed["shallow"] += int((products(x, deltas[SHALLOW]) < 0).sum())
            capped = mix(deltas, ceiling=1.0)[DEEP]
            opposed["deep, ceiling 1"] += int((products(capped, deltas[DEEP]) < -1e-12).sum())
    assert opposed["deep"] > 0 and opposed["shallow"] > 0 and opposed["deep, ceiling 1"] == 0


@pytest.mark.parametrize("mode", MODES)
def test_formulas_by_hand(mode: str) -> None:
    """One kernel of two entries: g0 = (1, 0), gk = (-3, 4), so that b = -3, a = 1, c = -0.6, norms 1 and 5."""
    deltas = {
        n: torch.tensor(x, dtype=torch.float64).view(1, 1, 1, 2) / 100
        for n, x in ((SHALLOW, (1.0, 0.0)), (DEEP, (-3.0, 4.0)))
    }
    unit = {"theorem": (0.0, 4.0), "algorithm1": (3 * (-0.6 + 3), 3 * 0.8), "normalised": (0.0, 2.4)}
    expected = torch.tensor(unit.get(mode, (3 * (-0.6 + 3), 3 * 0.8)), dtype=torch.float64) / 100
    found = mix(deltas, mode)[DEEP].flatten()  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=2e-3 if mode == "published" else 1e-9, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_zero_changes_and_coordinates_that_nobody_holds(mode: str) -> None:
    deltas = kernels(3)
    deltas[SHALLOW][0], deltas[DEEP][1] = 0.0, 0.0
    x = mix(deltas, mode)[DEEP]  # type: ignore[arg-type]
    assert x.isfinite().all() and (x[1] == 0).all()
    half = 0.5 if mode == "published" else 1.0
    torch.testing.assert_close(x[0], half * deltas[DEEP][0], rtol=1e-3, atol=1e-9)
    rows = {f"blocks.{i}.up.weight": torch.randn(4, 6, dtype=torch.float64) / 99 for i in range(2)}
    rows["blocks.1.up.weight"][:, 4:] = 0.0  # inputs that no client's slice has
    mixed = mix(rows, mode, matrices=True)["blocks.1.up.weight"]  # type: ignore[arg-type]
    assert (mixed[:, 4:] == 0).all() and not torch.equal(mixed, rows["blocks.1.up.weight"])


@pytest.mark.parametrize("mode", MODES)
def test_a_kernel_depends_on_its_own_two_changes_only(mode: str) -> None:
    deltas = kernels(5)
    before = mix(deltas, mode)[DEEP].clone()  # type: ignore[arg-type]
    deltas[DEEP][1, 2] *= -2
    after = mix(deltas, mode)[DEEP]  # type: ignore[arg-type]
    changed = (before != after).flatten(2).any(-1)
    assert changed.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("mode", ["theorem", "algorithm1", "normalised"])
def test_these_mixes_scale_with_the_changes(mode: str) -> None:
    deltas = kernels(7)
    larger = mix({n: 8 * x for n, x in deltas.items()}, mode)[DEEP]  # type: ignore[arg-type]
    torch.testing.assert_close(larger, 8 * mix(deltas, mode)[DEEP])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_mix_keeps_dtypes_and_published_entries_within_a_tenth(dtype: torch.dtype) -> None:
    deltas = {n: x.to(dtype) for n, x in kernels(9, scale=0.5).items()}
    found = mix(deltas)
    assert found[DEEP].dtype == dtype and found[DEEP].abs().max() <= 0.1001 and found[SHALLOW] is deltas[SHALLOW]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "theorm"}, "mode 'theorm' is unknown"),
        ({"ceiling": -1.0}, "ceiling is -1.0"),
        ({"ceiling": float("nan")}, "nan"),
    ],
)
def test_bad_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        COMBINES["inco"](**options)
