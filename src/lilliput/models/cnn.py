"""Three small convolutional networks on which published federated and split programs compare.

Pooling comes before ReLU where the source has it after: the two commute, and ReLU does a quarter of the work.
Initialisation is torch's for nn.Conv2d and nn.Linear: weights and biases uniform within 1 / sqrt(fan-in).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.models.images import channels_last, image_shape


class CNN(nn.Module):
    """McMahan's CNN for small images (AISTATS 2017): two 5x5 convolutions with pooling; 2.2M parameters for CIFAR.

    https://arxiv.org/abs/1602.05629  Padding keeps sizes; 1,663,370 parameters for 1 x 28 x 28 and 2,156,490 for
    3 x 32 x 32 with 10 classes.
    """

    def __init__(
        self, *, shape: Sequence[int], classes: int, channels: Sequence[int] = (32, 64), hidden: int = 512
    ) -> None:
        super().__init__()
        inputs, height, width = image_shape("cnn", shape, least=4)
        self.conv1 = nn.Conv2d(inputs, channels[0], 5, padding=2)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5, padding=2)
        self.fc1 = nn.Linear(channels[1] * (height // 4) * (width // 4), hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        x = F.max_pool2d(self.conv1(channels_last(x)), 2).relu()
        x = F.max_pool2d(self.conv2(x), 2).relu()
        return self.fc2(self.fc1(x.flatten(1)).relu())


class PflCNN(nn.Module):
    """The CNN of pfl-research's CIFAR-10 benchmark: two 3x3 convolutions, one pooling, dropout; 1.6M parameters.

    https://arxiv.org/abs/2404.06430  No padding; 1,626,442 parameters for 3 x 32 x 32 and 10 classes.  `dropout` acts
    after the pool and after fc1, as in the benchmark; (0, 0) turns it off.
    """

    def __init__(
        self,
        *,
        shape: Sequence[int],
        classes: int,
        channels: Sequence[int] = (32, 64),
        hidden: int = 128,
        dropout: Sequence[float] = (0.25, 0.5),
    ) -> None:
        super().__init__()
        inputs, height, width = image_shape("cnn_pfl", shape, least=6)
        self.conv1 = nn.Conv2d(inputs, channels[0], 3)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 3)
        self.dropout1 = nn.Dropout(dropout[0])
        self.fc1 = nn.Linear(channels[1] * ((height - 4) // 2) * ((width - 4) // 2), hidden)
        self.dropout2 = nn.Dropout(dropout[1])
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        x = self.conv1(channels_last(x)).relu()
        x = self.dropout1(F.max_pool2d(self.conv2(x), 2).relu())
        x = self.fc1(x.flatten(1)).relu()
        return self.fc2(self.dropout2(x))


class SimpleConv(nn.Module):
    """FSL-SAGE's `simple_conv`, the CNN of TensorFlow's CIFAR-10 tutorial with its two LRN layers; 1.8M parameters.

    conv 5x5 (64), ReLU, pool 3/2, LRN, conv 5x5 (64), ReLU, LRN, pool 3/2, then fc 384, 192 and classes.  The published
    program fixes the first fc at 2,304 inputs, which only 24 x 24 crops give; here it follows the shape.
    1,068,298 parameters for 3 x 24 x 24, 1,756,426 for 3 x 32 x 32.
    """

    def __init__(self, *, shape: Sequence[int], classes: int, channels: int = 64) -> None:
        super().__init__()
        inputs, height, width = image_shape("simple_conv", shape)
        side = [(n + 3) // 4 for n in (height, width)]  # two poolings of stride 2, each rounding up
        self.conv1 = nn.Conv2d(inputs, channels, 5, padding=2)
        self.norm1 = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)  # torch divides alpha by the 9 channels
        self.conv2 = nn.Conv2d(channels, channels, 5, padding=2)
        self.norm2 = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.fc1 = nn.Linear(channels * side[0] * side[1], 384)
        self.fc2 = nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        x = self.norm1(self.pool(self.conv1(channels_last(x))).relu())
        x = self.pool(self.norm2(self.conv2(x).relu()))
        x = self.fc1(x.flatten(1)).relu()
        return self.fc3(self.fc2(x).relu())
