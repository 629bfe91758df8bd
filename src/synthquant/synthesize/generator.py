"""The generator of Genie-D: from latents to normalised images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GeneratorKind = Literal["auto", "genie", "light"]

GENIE_WIDTHS = (128, 64)
"""Channels of the paper's generator (arXiv:2212.04780) before each upsampling."""

LIGHT_WIDTHS = (32, 16)
"""The same of the light generator."""

LARGEST_SIDE_OF_GENIE = 64
"""Longest side of images, in pixels, up to which `auto` is the paper's generator, designed on 32x32."""


def make_generator(
    kind: GeneratorKind, latent_size: int, image_shape: tuple[int, int, int], device: torch.device
) -> Generator:
    """Return the generator of a kind for images of a shape `(C, H, W)`; its weights are undefined until `reset`."""
    if kind == "auto":
        kind = "genie" if max(image_shape[1:]) <= LARGEST_SIDE_OF_GENIE else "light"
    if kind == "genie":
        return Generator(latent_size, image_shape, GENIE_WIDTHS, device)
    return Generator(None, image_shape, LIGHT_WIDTHS, device)


class Generator(nn.Module):
    """Latents to normalised images `[B, C, H, W]` with batch mean 0 and deviation 1 per channel.

    A linear layer takes latents `[B, latent_size]` to `widths[0]` channels at `1 / 2 ** len(widths)` of the size.
    Without a `latent_size` there is none, and the latents are these maps themselves: of as many latents as a batch has,
    a linear layer of as many inputs reaches any maps, at the price of a matrix of `latent_size` times their size. Then
    for each width a batch norm and an upsampling convolution to the next width, the last to the channels of images,
    with leaky ReLU between them; tanh, and a batch norm without parameters. Sizes that do not divide are cropped from
    the next ones that do. Its weights are undefined until `reset`.
    """

    def __init__(
        self, latent_size: int | None, image_shape: tuple[int, int, int], widths: tuple[int, ...], device: torch.device
    ) -> None:
        super().__init__()
        step = 2 ** len(widths)
        channels, *self.image_size = image_shape
        height, width = (math.ceil(side / step) for side in self.image_size)
        self.start_shape = (widths[0], height, width)
        self.latent_shape = self.start_shape if latent_size is None else (latent_size,)
        self.device = device
        # Built without values: layers would draw theirs from the global random state.
        with torch.device("meta"):
            self.linear = None if latent_size is None else nn.Linear(latent_size, math.prod(self.start_shape))
            self.norms = nn.ModuleList(nn.BatchNorm2d(width, track_running_stats=False) for width in widths)
            pairs = zip(widths, (*widths[1:], channels), strict=True)
            self.convs = nn.ModuleList(UpsampledConv(inner, outer) for inner, outer in pairs)
            self.last_norm = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)
        self.to_empty(device=device)

    def reset(self, generator: torch.Generator) -> None:
        """Start afresh in place, with PyTorch's default distributions, from a generator on the CPU."""
        layers: list[nn.Linear | UpsampledConv] = [] if self.linear is None else [self.linear]
        layers += cast("Iterable[UpsampledConv]", self.convs)
        with torch.no_grad():
            for layer in layers:
                bound = 1 / math.sqrt(layer.weight[0].numel())
                for parameter in (layer.weight, layer.bias):
                    values = torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound)
                    parameter.copy_(values)
            for norm in cast("Iterable[nn.BatchNorm2d]", self.norms):
                norm.reset_parameters()

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents `[B, *latent_shape]` to images, channels-last, float32."""
        features = latents
        if self.linear is not None:
            channels, height, width = self.start_shape
            features = self.linear(latents).view(-1, height, width, channels).permute(0, 3, 1, 2)
        for index, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            features = norm(features)
            if index:
                features = F.leaky_relu(features, 0.2, inplace=True)
            features = conv(features)
        images: Tensor = self.last_norm(self._crop(features).float().tanh())
        return images.contiguous(memory_format=torch.channels_last)

    def _crop(self, images: Tensor) -> Tensor:
        height, width = self.image_size
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, top : top + height, left : left + width]


class UpsampledConv(nn.Module):
    """Nearest upsampling by 2, then a 3x3 convolution with padding 1, computed at the low resolution.

    Each output pixel sees at most 2x2 distinct input pixels, so the 3x3 kernel folds into a 4x4 one of a transposed
    convolution with stride 2.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        """Of the 3x3 convolution `[C_out, C_in, 3, 3]`."""
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[B, C_in, H, W]` to `[B, C_out, 2H, 2W]`."""
        mirrored = self.weight.flip(2, 3).transpose(0, 1)
        folded = 4 * F.avg_pool2d(F.pad(mirrored, (1, 1, 1, 1)), 2, stride=1)  # sums over 2x2 neighbours
        return F.conv_transpose2d(inputs, folded, self.bias, stride=2, padding=1)
