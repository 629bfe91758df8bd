"""Images spoilt on purpose, as examples of what no network was trained on."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Corruption = Literal["noise", "blur", "color", "shuffle"]
"""Gaussian noise, loss of all detail, a negative with other colours, patches in another order."""

CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)

_NOISE = 0.25
_GRID = 4


def corrupt(pixels: Tensor, kind: Corruption, generator: torch.Generator) -> Tensor:
    """Return a spoilt copy of one image `[C, H, W]` in 0..1; `generator` belongs to the CPU."""
    if kind == "noise":
        noise = torch.randn(pixels.shape, generator=generator).to(pixels)
        return (pixels + _NOISE * noise).clamp(0, 1)
    if kind == "blur":
        height, width = pixels.shape[1:]
        coarse = F.adaptive_avg_pool2d(pixels[None], (-(-height // 8), -(-width // 8)))
        return F.interpolate(coarse, (height, width), mode="bilinear")[0]
    if kind == "color":
        shift = 1 + int(torch.randint(2, (), generator=generator))
        return 1 - pixels.roll(shift, 0)
    return _shuffled(pixels, torch.randperm(_GRID**2, generator=generator))


def _shuffled(pixels: Tensor, order: Tensor) -> Tensor:
    """A grid of patches in another order; rows and columns beyond the last whole patch stay."""
    channels, (height, width) = len(pixels), (size // _GRID for size in pixels.shape[1:])
    result = pixels.clone()
    inside = result[:, : height * _GRID, : width * _GRID]
    patches = inside.reshape(channels, _GRID, height, _GRID, width).transpose(2, 3)
    patches = patches.reshape(channels, _GRID**2, height, width)
    moved = patches[:, order.to(pixels.device)].reshape(channels, _GRID, _GRID, height, width).transpose(2, 3)
    inside.copy_(moved.reshape(inside.shape))
    return result
