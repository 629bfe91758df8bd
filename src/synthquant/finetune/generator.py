"""The generator that learns beside the network: from noise and classes to normalised images."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.synthesize.generator import UpsampledConv

_CHANNELS = (128, 128, 64)
"""Before the first upsampling, behind it and behind the second (GDFQ, arXiv:2003.03603)."""


class ClassNorm(nn.Module):
    """Batch norm whose scale and shift depend on the class of each image; mixed classes have mixed ones.

    Attributes:
        scale: `[classes, C]`.
        shift: `[classes, C]`.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(classes, channels))
        self.shift = nn.Parameter(torch.zeros(classes, channels))

    def forward(self, features: Tensor, classes: Tensor) -> Tensor:
        """Normalise `[B, C, H, W]` over the batch; `classes` are shares `[B, classes]` that add up to 1."""
        normal = F.batch_norm(features, None, None, training=True)
        scale, shift = ((classes @ part)[:, :, None, None] for part in (self.scale, self.shift))
        return normal * scale + shift


class ClassGenerator(nn.Module):
    """Noise `[B, latent_size]` and shares of classes `[B, classes]` to normalised images `[B, C, H, W]`.

    A linear layer makes 128 maps at a quarter of the size; twice upsampling and a 3x3 convolution, with batch norms of
    the class and leaky ReLU; a 3x3 convolution to the channels of images, tanh, and a batch norm without parameters.
    Sizes that 4 does not divide are cropped.
    """

    def __init__(
        self, classes: int, latent_size: int, image_shape: tuple[int, int, int], generator: torch.Generator
    ) -> None:
        """Draw its weights, with PyTorch's default distributions, from `generator` on the CPU."""
        super().__init__()
        self.classes, self.latent_size = classes, latent_size
        channels, *self.image_size = image_shape
        self._start = (_CHANNELS[0], *(math.ceil(side / 4) for side in self.image_size))
        with torch.device("meta"):  # layers would draw their values from the global random state
            self.linear = nn.Linear(latent_size, math.prod(self._start))
            self.convs = nn.ModuleList([UpsampledConv(128, 128), UpsampledConv(128, 64)])
            self.last = nn.Conv2d(_CHANNELS[-1], channels, 3, padding=1)
        self.to_empty(device="cpu")
        self.norms = nn.ModuleList(ClassNorm(width, classes) for width in _CHANNELS)
        with torch.no_grad():
            for layer in (self.linear, *self.convs, self.last):
                weight = cast(Tensor, layer.weight)
                bound = weight[0].numel() ** -0.5
                for parameter in layer.parameters():
                    parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Make the images."""
        first, *others = self.norms
        channels, height, width = self._start
        features = self.linear(latents).view(-1, height, width, channels).permute(0, 3, 1, 2)
        features = first(features, classes)
        for conv, norm in zip(self.convs, others, strict=True):
            features = F.leaky_relu(norm(conv(features), classes), 0.2)
        height, width = self.image_size
        images: Tensor = F.batch_norm(self.last(features)[:, :, :height, :width].tanh(), None, None, training=True)
        return images.contiguous(memory_format=torch.channels_last)
