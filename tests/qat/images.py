"""Small convolutional networks with BatchNorm, as they are found: residuals, concatenation, depthwise, 1-D."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += x
        return F.relu(y)


class Residual(nn.Module):
    """conv-bn-relu, a residual block, a branch that is concatenated, a linear behind which a BatchNorm1d."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU())
        self.block = Block(8)
        self.side = nn.Conv2d(8, 4, 1)
        self.side_bn = nn.BatchNorm2d(4, affine=False)
        self.fc = nn.Linear(12, 16)
        self.fc_bn = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = torch.cat([x, self.side_bn(self.side(x))], dim=1).mean((2, 3))
        out: Tensor = self.head(F.relu(self.fc_bn(self.fc(x))))
        return out


def trained(model: nn.Module, *shape: int) -> nn.Module:
    """Statistics and affine parameters that are not the ones of a new network."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.3, 1.7)
            nn.init.normal_(module.bias)
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(16, *shape) * 2 + 0.5)
    return model.eval()


def residual() -> nn.Module:
    """The same weights at each call."""
    torch.manual_seed(0)
    return trained(Residual(), 3, 8, 8)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2
