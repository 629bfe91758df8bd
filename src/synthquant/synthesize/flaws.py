"""What is wrong with a drawn image: blank, of one colour, or nearly the same as an earlier one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLACK_LEVEL = 16
"""An image is black if no value (of 255) exceeds it: what a safety checker blanks and overflowed numbers decode to."""

CONSTANT_DEVIATION = 4.0
"""An image is of one colour if the values of each channel deviate less than this (of 255)."""

NEAR_DUPLICATE_LEVELS = 2.0
"""Two images are nearly the same if their 8x8 thumbnails differ by less than this (of 255) on average.

Among 5,000 real CIFAR-10 images the most alike two of a class differ by 7.6.
"""

_THUMBNAIL = 8


def black(images: Tensor) -> Tensor:
    """Which images, uint8 `[N, 3, H, W]`, are black: bool `[N]`."""
    return images.flatten(1).amax(1) <= BLACK_LEVEL


def constant(images: Tensor) -> Tensor:
    """Which images, uint8 `[N, 3, H, W]`, have one colour: bool `[N]`. Black ones are among them."""
    return images.float().std((2, 3)).amax(1) < CONSTANT_DEVIATION


def thumbnails(images: Tensor) -> Tensor:
    """Mean colours of 8x8 fields of images uint8 `[N, 3, H, W]`: uint8 `[N, 192]`."""
    return F.adaptive_avg_pool2d(images.float(), _THUMBNAIL).flatten(1).round().to(torch.uint8)


class SeenImages:
    """Remembers thumbnails of the images of each class, 192 bytes an image."""

    def __init__(self) -> None:
        self._seen: dict[int, list[Tensor]] = {}

    def add(self, label: int, thumbnail: Tensor) -> None:
        """Remember an image by its class and its thumbnail `[192]`."""
        self._seen.setdefault(label, []).append(thumbnail)

    def holds(self, label: int, thumbnail: Tensor) -> bool:
        """Return whether nearly the same image of the class is remembered."""
        seen = self._seen.get(label)
        if not seen:
            return False
        if len(seen) > 1:  # one tensor from now on: comparing with it is one operation
            seen[:] = [torch.cat([rows.view(-1, rows.shape[-1]) for rows in seen])]
        rows = seen[0].view(-1, thumbnail.shape[-1])
        return bool(((rows.float() - thumbnail.float()).abs().mean(1) < NEAR_DUPLICATE_LEVELS).any())
