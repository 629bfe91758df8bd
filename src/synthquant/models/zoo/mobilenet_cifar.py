"""MobileNetV2 of width 0.5 for 32x32 images, Sandler et al. 2018 (arXiv:1801.04381), table 2, with other strides."""

from __future__ import annotations

import torch
from torch import nn

# Expansion, output channels, blocks, stride of the first. Table 2 of the paper at half its width (in multiples of 8;
# the last convolution at its full width, as there), but 32x32 images keep their size in the stem, and the last stages
# still see 4x4 positions. Width and strides are such that one core of a CPU trains it in about an hour.
STAGES = ((1, 8, 1, 1), (6, 16, 2, 2), (6, 16, 3, 2), (6, 32, 4, 1), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))


class ConvNormActivation(nn.Sequential):
    """Convolution without bias, batch norm and, if `activation`, ReLU6; the image keeps its size but for `stride`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        parts: list[nn.Module] = [
            nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        if activation:
            parts.append(nn.ReLU6(inplace=True))
        super().__init__(*parts)


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3 depthwise), project (1x1, linear); a shortcut where the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        parts = [
            ConvNormActivation(hidden, hidden, 3, stride, groups=hidden),
            ConvNormActivation(hidden, out_channels, 1, activation=False),
        ]
        if expansion != 1:
            parts.insert(0, ConvNormActivation(in_channels, hidden, 1))
        self.conv = nn.Sequential(*parts)
        self.shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[B, out_channels, H / stride, W / stride]` for `[B, in_channels, H, W]`."""
        out: torch.Tensor = self.conv(x)
        return x + out if self.shortcut else out


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 of width 0.5.

    Input `[B, 3, 32, 32]`, output logits `[B, num_classes]`.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        channels = 16
        parts: list[nn.Module] = [ConvNormActivation(3, channels, 3)]
        for expansion, out_channels, blocks, stride in STAGES:
            for block in range(blocks):
                parts.append(InvertedResidual(channels, out_channels, stride if block == 0 else 1, expansion))
                channels = out_channels
        parts.append(ConvNormActivation(channels, 1280, 1))
        self.features = nn.Sequential(*parts)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, num_classes]` for images `[B, 3, 32, 32]`."""
        logits: torch.Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def mobilenetv2(num_classes: int = 10) -> CifarMobileNetV2:
    """MobileNetV2 of width 0.5: 0.7 M parameters, 21 M multiply-adds at 32x32."""
    return CifarMobileNetV2(num_classes)
