"""A small UNet with every way of going up: transposed convolution, resizing, concatenation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def double(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions."""
    parts: list[nn.Module] = []
    for channels in (inputs, outputs):
        parts += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*parts)


class UNet(nn.Module):
    """Two levels; classifies by the mean of its output map."""

    def __init__(self, channels: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.down1, self.down2 = double(3, channels), double(channels, 2 * channels)
        self.middle = double(2 * channels, 4 * channels)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(4 * channels, 2 * channels, 2, stride=2)
        self.join2 = double(4 * channels, 2 * channels)
        self.up1 = nn.Upsample(scale_factor=2, mode="nearest")
        self.join1 = double(3 * channels, channels)
        self.out = nn.Conv2d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[B, classes]`."""
        first = self.down1(x)
        second = self.down2(self.pool(first))
        y = self.up2(self.middle(self.pool(second)))
        y = self.join2(torch.cat([y, second], 1))
        y = self.join1(torch.cat([self.up1(y), first], 1))
        maps: Tensor = self.out(y)
        return maps.mean((2, 3))


def build() -> nn.Module:
    """The network with random weights, the same each time."""
    torch.manual_seed(0)
    return UNet()
