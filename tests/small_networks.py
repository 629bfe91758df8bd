"""A small network with every kind of layer that quantization meets, from a user's file as `open_model` takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from synthquant.data.image_set import ImageSet
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights

CLASSES = 7

SOURCE = '''
import torch
from torch import nn


class Block(nn.Module):
    """Residual block; its input feeds a convolution and the shortcut."""

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.down = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.relu(out)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 12))
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=2)
        self.after = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 7)

    def forward(self, x):
        x = self.blocks(self.relu(self.norm(self.stem(x))))
        x = self.after(torch.relu(self.up(x)))
        return self.fc(x.mean(dim=(2, 3)))


def build(seed=0):
    generator = torch.Generator().manual_seed(seed)
    network = Network()
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return network


def build_other():
    return build(seed=1)
'''


def small_float_model(folder: Path, function: str = "build") -> FloatModel:
    """Write the network's file into `folder` and open it."""
    path = folder / "small_network.py"
    path.write_text(SOURCE, encoding="utf-8")
    return open_model(f"{path}:{function}", input_size=16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def small_images(count: int = 12, seed: int = 0) -> ImageSet:
    """Labelled noise images in pixel space."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return ImageSet.from_tensors(images, labels=torch.arange(count) % CLASSES)


def calibrated_model(float_model: FloatModel, scheme: str | dict[str, Any] = "W4A4") -> QuantModel:
    """Quantize by nearest rounding with min-max ranges."""
    model = QuantModel.build(float_model, QuantScheme.parse(scheme))
    calibrate_weights(model, "minmax")
    calibrate_activations(model, CalibrationSet(model, small_images()), 12, "minmax", quantized_weights=False)
    return model
