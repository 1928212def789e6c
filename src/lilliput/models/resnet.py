"""Residual networks (He et al., CVPR 2016, https://arxiv.org/abs/1512.03385) in their two families.

`CifarResNet`: three stages of 16, 32 and 64 channels, shortcuts without parameters (option A); its names fit the
checkpoints at github.com/akamaster/pytorch_resnet_cifar10.  `ResNet` and `BottleneckResNet`: four stages of 64 to 512,
projection shortcuts (option B), an ImageNet or a CIFAR stem; their names fit torchvision's checkpoints.
Each family is initialised as its source is; both leave every scale of a norm at 1 and every shift at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.core.layers import make_safe
from lilliput.models.images import channels_last, image_shape

Norm = Callable[[int], nn.Module]


def normaliser(norm: str, groups: int) -> Norm:
    """A function that makes the norm for a number of channels: "batch", or "group" with `groups` groups.

    Hsieh et al. (https://arxiv.org/abs/1910.00189) chose two groups for federated data.
    """
    if norm == "batch":
        return nn.BatchNorm2d
    if norm != "group":
        raise ValueError(f"norm {norm!r} is unknown; choose batch or group")

    def group_norm(channels: int) -> nn.Module:
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into groups={groups}; choose a divisor of every width")
        return nn.GroupNorm(groups, channels)

    return group_norm


class PadShortcut(nn.Module):
    """Option A: keeps every `stride`-th pixel and fills the new channels with zeros, half of them on either side."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, extra

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class BasicBlock(nn.Module):
    """Two convolutions of `width` channels, 3x3 or another kernel, beside a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(
        self, inputs: int, width: int, stride: int, norm: Norm, shortcut: nn.Module | None, kernel: int = 3
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, kernel, 1, kernel // 2, bias=False)
        self.bn2 = norm(width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out))
        return out.add_(x if self.downsample is None else self.downsample(x)).relu_()


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; the stride is in the 3x3, as in torchvision."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = norm(4 * width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).relu_()
        out = self.bn3(self.conv3(out))
        return out.add_(x if self.downsample is None else self.downsample(x)).relu_()


class CifarResNet(nn.Module):
    """CIFAR ResNet of 2 * sum(blocks) + 2 layers: ResNet-20 is (3, 3, 3).

    width:  channels of the first stage, doubled at each next stage (FSL-SAGE's wide ResNet-110 has 64).
    kernel: the side of every convolution (FedSub's have 7).
    norm, groups: BatchNorm, or GroupNorm with this number of groups.
    Convolutions and the linear layer start from Kaiming's normal over the fan-in, the linear bias from torch's uniform.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        shape: Sequence[int],
        classes: int,
        width: int = 16,
        kernel: int = 3,
        norm: Literal["batch", "group"] = "batch",
        groups: int = 2,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; shortcuts need an odd one, such as 3 or 7")
        make = normaliser(norm, groups)
        channels = image_shape("a ResNet", shape)[0]
        self.conv1 = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
        self.bn1 = make(width)
        widths = [width << stage for stage in range(len(blocks))]
        for stage, (count, inputs, outputs) in enumerate(zip(blocks, [width, *widths], widths, strict=False)):
            shortcut = PadShortcut(2, outputs - inputs) if stage else None
            first = BasicBlock(inputs, outputs, 2 if stage else 1, make, shortcut, kernel)
            rest = (BasicBlock(outputs, outputs, 1, make, None, kernel) for _ in range(count - 1))
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        x = self.bn1(self.conv1(channels_last(x))).relu_()
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class ResNet(nn.Module):
    """torchvision's ResNet with `blocks` per stage: ResNet-18 is (2, 2, 2, 2); 10, 14, 22 and 26 are the tiers of InCo.

    `stem="imagenet"` is a 7x7 convolution and a pool, both of stride 2; published programs use it even for 32 x 32
    images.  `stem="cifar"` is a 3x3 convolution of stride 1.  `width` is the channels of the first stage, doubled at
    each next stage.  Convolutions start from Kaiming's normal over the fan-out for ReLU, `fc` from torch's uniform.
    """

    block: ClassVar[type[BasicBlock] | type[Bottleneck]] = BasicBlock
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        shape: Sequence[int],
        classes: int,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        width: int = 64,
        norm: Literal["batch", "group"] = "batch",
        groups: int = 2,
    ) -> None:
        super().__init__()
        make, channels = normaliser(norm, groups), image_shape("a ResNet", shape)[0]
        if stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem {stem!r} is unknown; choose imagenet or cifar")
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = make(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        inputs = width
        for stage, count in enumerate(blocks):
            layer = self._stage(inputs, width << stage, count, 2 if stage else 1, make)
            self.add_module(f"layer{stage + 1}", layer)
            inputs = (width << stage) * self.block.expansion
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        make_safe(self)

    def _stage(self, inputs: int, width: int, count: int, stride: int, norm: Norm) -> nn.Sequential:
        """`count` blocks; the first has a projection as its shortcut if it changes size."""
        outputs = width * self.block.expansion
        projection = None
        if stride != 1 or inputs != outputs:
            projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        first = self.block(inputs, width, stride, norm, projection)
        return nn.Sequential(first, *(self.block(outputs, width, 1, norm, None) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        x = self.maxpool(self.bn1(self.conv1(channels_last(x))).relu_())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class BottleneckResNet(ResNet):
    """torchvision's ResNet with bottleneck blocks: ResNet-50 is (3, 4, 6, 3)."""

    block = Bottleneck
