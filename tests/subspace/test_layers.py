"""Layers in subspaces against the layers that they stand for: values, gradients, and what they keep."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from lilliput.subspace import SubspaceConv2d, SubspaceLayer, SubspaceLinear, seeded_basis

SHARED = Path(os.environ.get("LILLIPUT_SHARED", Path(__file__).parents[3] / "shared"))
PROJECTIONS = ("cd", "rd", "ss")
CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "groups": 2, "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": 2},
    {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 1, "groups": 4, "padding": (0, 1), "padding_mode": "circular"},
]


def linear(projection: str, bias: bool = True, rank: int = 3) -> SubspaceLinear:
    """10 -> 8 in double precision, away from b = 0."""
    torch.manual_seed(0)
    layer = SubspaceLinear(nn.Linear(10, 8, bias=bias).double(), seeded_basis(projection, rank, 10, "test"))
    nn.init.normal_(layer.b)
    return layer


def conv(projection: str, along: Any, options: dict[str, Any], rank: int = 2) -> tuple[SubspaceConv2d, nn.Conv2d]:
    """4 -> 8 channels in double precision, away from b = 0, and the convolution that it stands for."""
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 8, **options).double()
    width = plain.weight[0].numel() if along == "filter" else plain.weight.shape[-1]
    layer = SubspaceConv2d(copy.deepcopy(plain), seeded_basis(projection, min(rank, width), width, "test"), along)
    nn.init.normal_(layer.b)
    plain.weight.data.copy_(layer.dense())
    return layer, plain


def agrees(layer: SubspaceLayer, plain: nn.Module, x: Tensor) -> None:
    """Output, gradient of the input, of b (the dense one times P^T) and of the bias."""
    own, dense = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = layer(own), plain(dense)
    torch.testing.assert_close(y, z)
    slope = torch.randn_like(y)
    y.backward(slope), z.backward(slope)
    torch.testing.assert_close(own.grad, dense.grad)
    weight: Any = plain.weight
    torch.testing.assert_close(layer.b.grad, layer.basis.compress(layer.form.matrix(weight.grad)))
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 20, 10), (2, 3, 4, 10)])
def test_linear_is_the_layer_with_the_moved_weight(projection: str, bias: bool, shape: tuple[int, ...]) -> None:
    layer = linear(projection, bias)
    plain = nn.Linear(10, 8, bias=bias).double()
    with torch.no_grad():
        plain.weight.copy_(layer.weight + layer.b @ layer.basis.dense())
        if bias:
            plain.bias.copy_(layer.bias)
    torch.testing.assert_close(layer.dense(), plain.weight.data)
    agrees(layer, plain, torch.randn(*shape, dtype=torch.double))


@pytest.mark.parametrize("along", ["filter", "width"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_convolution_is_the_layer_with_the_moved_weight(along: str, options: dict[str, Any], projection: str) -> None:
    layer, plain = conv(projection, along, options)
    agrees(layer, plain, torch.randn(2, 4, 9, 8, dtype=torch.double))
    torch.testing.assert_close(layer(torch.ones(4, 9, 8).double()), plain(torch.ones(4, 9, 8).double()))


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("rows", [2, 12])
def test_gradients_of_linear(projection: str, rows: int) -> None:
    layer = linear(projection)
    inputs = (torch.randn(rows, 10, dtype=torch.double), layer.b.detach().clone(), layer.bias.detach().clone())
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b, bias: functional_call(layer, {"b": b, "bias": bias}, (x,)), inputs)


@pytest.mark.parametrize("size", [4, 9])  # of the images: kept as they are, kept compressed
def test_gradients_of_a_convolution(size: int) -> None:
    layer, _ = conv("ss", "filter", {"kernel_size": 3, "stride": 2, "groups": 2}, rank=3)
    inputs = (torch.randn(2, 4, size, size, dtype=torch.double), layer.b.detach().clone())
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: functional_call(layer, {"b": b}, (x,)), inputs)


def kept(module: nn.Module, x: Tensor) -> int:
    """Numbers that the backward pass keeps beside parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(found.values())


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("rows", [2, 40])
def test_linear_keeps_rank_numbers_a_row_and_no_weight(projection: str, rows: int) -> None:
    layer = linear(projection)
    assert kept(layer, torch.randn(rows, 10, dtype=torch.double)) == rows * 3


def test_a_convolution_keeps_the_smaller_of_input_and_compressed_input() -> None:
    x = torch.randn(2, 4, 9, 9, dtype=torch.double)
    small, _ = conv("cd", "filter", {"kernel_size": 3, "stride": 2}, rank=2)
    assert kept(small, x) == 2 * 2 * 4 * 4
    large, _ = conv("cd", "filter", {"kernel_size": 3, "padding": 1}, rank=5)
    assert kept(large, x) == x.numel()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_folding_changes_no_output(projection: str) -> None:
    channels_last = conv(projection, "filter", {"kernel_size": 3})[0].to(memory_format=torch.channels_last)
    for layer, x in ((linear(projection), torch.randn(3, 10)), (channels_last, torch.randn(2, 4, 5, 5))):
        x = x.double()
        before = layer(x)
        layer.fold()
        assert not layer.b.any()
        torch.testing.assert_close(layer(x), before)


def test_autocast_keeps_what_it_computes_with() -> None:
    layer = SubspaceLinear(nn.Linear(16, 8), seeded_basis("ss", 4, 16, "test"))
    nn.init.normal_(layer.b)
    x, plain = torch.randn(20, 16), nn.Linear(16, 8)
    plain.load_state_dict({"weight": layer.dense(), "bias": layer.bias.detach()})
    with torch.autocast("cpu", torch.bfloat16):
        y, z = layer(x), plain(x)
    assert y.dtype == z.dtype == torch.bfloat16
    torch.testing.assert_close(y, z, atol=0.05, rtol=0.02)  # bf16 kernels of one product differ by its rounding
    y.float().sum().backward()
    assert layer.b.grad.dtype == torch.float32
    exact = torch.ones(20, 8).T @ layer.basis.compress(x)
    torch.testing.assert_close(layer.b.grad, exact, atol=0.1, rtol=0.02)


def test_accumulated_micro_batches_give_the_gradient_of_the_batch() -> None:
    layer, x = linear("ss"), torch.randn(12, 10, dtype=torch.double)
    F.mse_loss(layer(x), torch.zeros(12, 8).double()).backward()
    whole, layer.b.grad = layer.b.grad, None
    for part in x.chunk(3):
        (F.mse_loss(layer(part), torch.zeros(4, 8).double()) / 3).backward()
    torch.testing.assert_close(layer.b.grad, whole)


def test_a_basis_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a basis of 4 rows of 10 does not fit a layer of rank 3"):
        linear("cd").use(seeded_basis("cd", 4, 10, "other"))


def test_recorded_layers() -> None:
    path = SHARED / "golden/subspace/fedsub_layers.safetensors"
    if not path.exists():
        pytest.skip("the recorded layers in shared/golden/subspace are not here")
    from safetensors.torch import load_file

    from lilliput.subspace import Dense

    own = load_file(path)
    for kind in ("lin", "conv"):
        w, basis = own[f"{kind}.W"], Dense(own[f"{kind}.P"], orthonormal=False)
        if kind == "lin":
            plain: Any = nn.Linear(10, 7, bias=False)
        else:
            plain = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        # What is recorded as W is the dense base; the weight in use is W + b P.
        plain.weight.data.copy_(w)
        layer = SubspaceLinear(plain, basis) if kind == "lin" else SubspaceConv2d(plain, basis, "width")
        layer.b.data.copy_(own[f"{kind}.b"])
        x = own[f"{kind}.x"].clone().requires_grad_()
        y = layer(x)
        y.backward(own[f"{kind}.grad_y"])
        for ours, name in ((y, "y"), (layer.b.grad, "grad_b"), (x.grad, "grad_x")):
            torch.testing.assert_close(ours, own[f"{kind}.{name}"], atol=1e-5, rtol=0)
