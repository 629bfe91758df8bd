"""Random variants of images that are trained on, made where the images are.

Of several processes each has its share of a batch, and draws what it needs of the numbers for all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from synthquant.core.processes import ALONE, Processes


def flip(images: Tensor, generator: torch.Generator, processes: Processes = ALONE) -> Tensor:
    """Mirror each of `[B, C, H, W]` left to right with probability one half."""
    count = len(images) * processes.count
    mirrored = torch.rand(count, generator=generator, device=generator.device) < 0.5
    return torch.where(processes.share(mirrored).to(images.device).view(-1, 1, 1, 1), images.flip(3), images)


def shift(images: Tensor, share: float, generator: torch.Generator, processes: Processes = ALONE) -> Tensor:
    """Move each of `[B, C, H, W]` by up to that share of its sides, each way; what comes in is the mirrored border."""
    most = [min(round(share * side), side - 1) for side in images.shape[2:]]
    if not any(most):
        return images
    padded = F.pad(images, (most[1], most[1], most[0], most[0]), mode="reflect")
    count = len(images) * processes.count
    rows, columns = (
        processes.share(torch.randint(2 * way + 1, (count, 1), generator=generator, device=generator.device)).to(
            images.device
        )
        + torch.arange(side, device=images.device)
        for way, side in zip(most, images.shape[2:], strict=True)
    )
    batch = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    moved = padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)
