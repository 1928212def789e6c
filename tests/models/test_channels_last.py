"""Images in channels_last: what torch's kernels cannot do on some CPUs must not end the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from lilliput import models
from lilliput.core.layers import StridedPointwise, make_safe

CODE = """
import torch
from lilliput.core.layers import make_safe
torch.set_num_threads(1)
for _ in range(60):
    layer = torch.nn.Conv2d(4, 8, 1, 2, bias=False)
    make_safe(layer)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(4, 4, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    layer(x).square().sum().backward()
junk = [torch.randn(1000 + i) for i in range(200)]
"""


def test_gradients_of_few_channels_stay_within_their_memory() -> None:
    """Without `make_safe` the process dies of a damaged heap on CPUs without AVX-512."""
    assert subprocess.run([sys.executable, "-c", CODE], capture_output=True).returncode == 0


@pytest.mark.parametrize(("channels", "stride", "groups"), [(4, 2, 1), (6, (3, 2), 2), (1, 2, 1)])
def test_the_result_is_that_of_the_convolution(channels: int, stride: int, groups: int) -> None:
    layer = nn.Conv2d(channels, 4, 1, stride, groups=groups).double()
    x = torch.randn(2, channels, 7, 8, dtype=torch.float64)
    expected, names = layer(x), list(layer.state_dict())
    make_safe(layer)
    assert isinstance(layer, StridedPointwise) and list(layer.state_dict()) == names
    torch.testing.assert_close(layer(x), expected)


def test_narrow_resnets_have_safe_shortcuts() -> None:
    model = models.build("resnet10", shape=(3, 8, 8), classes=3, width=4, stem="cifar")
    assert any(isinstance(m, StridedPointwise) for m in model.modules())
    assert not any(
        isinstance(m, StridedPointwise) for m in models.build("resnet10", shape=(3, 8, 8), classes=3).modules()
    )
