"""A small residual network for small images (He et al., arXiv:1512.03385), with what quantization has to cope with.

::

    image -> conv-bn-relu -> Basic -> Basic /2 -> Separable -> Split -> Basic /2 -> mean -> linear -> logits
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat_plugin.errors import ConfigError


class SmallResNet(nn.Module):
    """Residual additions, a depthwise block and a concatenation, each convolution behind a BatchNorm.

    Args:
        classes: number of logits.
        channels: of the images.
        width: channels of the first block, an even number; the last has four times as many.

    Raises:
        ConfigError: for a number out of its range.
    """

    def __init__(self, classes: int = 10, channels: int = 1, width: int = 32) -> None:
        super().__init__()
        if classes < 2 or channels < 1 or width < 2 or width % 2:
            raise ConfigError(
                f"classes ({classes}) must be at least 2, channels ({channels}) at least 1, width ({width}) even and "
                "at least 2"
            )
        self.conv = _conv(channels, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Basic(width, width), Basic(width, 2 * width, stride=2), Separable(2 * width), Split(2 * width),
            Basic(2 * width, 4 * width, stride=2),
        )  # fmt: skip
        self.head = nn.Linear(4 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes] of [batch, channels, height, width]."""
        x = self.blocks(F.relu(self.bn(self.conv(images)), inplace=True))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Basic(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, out, 3, stride=stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = _conv(out, out, 3), nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(_conv(channels, out, 1, stride=stride), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, out, height / stride, width / stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class Separable(nn.Module):
    """A depthwise 3 x 3 and a pointwise convolution beside the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise, self.bn1 = _conv(channels, channels, 3, groups=channels), nn.BatchNorm2d(channels)
        self.pointwise, self.bn2 = _conv(channels, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The shape of ``x``."""
        y = self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x)), inplace=True)))
        y += x
        return F.relu(y, inplace=True)


class Split(nn.Module):
    """A 1 x 1 and a 3 x 3 convolution, half of the channels each, side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.near, self.bn1 = _conv(channels, channels // 2, 1), nn.BatchNorm2d(channels // 2)
        self.wide, self.bn2 = _conv(channels, channels // 2, 3), nn.BatchNorm2d(channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """The shape of ``x``."""
        return F.relu(torch.cat([self.bn1(self.near(x)), self.bn2(self.wide(x))], dim=1), inplace=True)


def _conv(channels: int, out: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride=stride, padding=size // 2, groups=groups, bias=False)
