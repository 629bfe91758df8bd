"""How a few labelled photographs are divided into images to calibrate with and images to measure on."""

from __future__ import annotations

import torch

from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images

CALIBRATION = 64


def divided(source: str, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Return the `CALIBRATION` images drawn by seed, as `images.source` draws them, and all others in their order."""
    images = open_images(source)
    order = torch.randperm(len(images), generator=Rng(seed).generator("draw images"))
    drawn = order[:CALIBRATION]
    others = torch.ones(len(images), dtype=torch.bool)
    others[drawn] = False
    return images.subset(drawn), images.subset(others.nonzero().flatten())
