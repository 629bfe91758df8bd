"""Prior terms of images, whatever the network makes of them: how smooth, and how bright."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm


def total_variation(images: Tensor) -> Tensor:
    """How rough images `[B, C, H, W]` are, averaged over them; a scalar.

    The code of DSG and PSAQ-ViT takes each norm over the batch, so that its weight depends on the batch's size; over B
    images alike it is `sqrt(B)` times this.
    """
    return total_variations(images).mean()


def total_variations(images: Tensor) -> Tensor:
    """How rough each of the images `[B, C, H, W]` is, `[B]`.

    The sum of four Euclidean norms: of the differences between neighbours along rows, columns and both diagonals.
    """
    differences = (
        images[:, :, :, 1:] - images[:, :, :, :-1],
        images[:, :, 1:] - images[:, :, :-1],
        images[:, :, 1:, 1:] - images[:, :, :-1, :-1],
        images[:, :, 1:, :-1] - images[:, :, :-1, 1:],
    )
    norms = torch.stack([vector_norm(one.flatten(1), dim=1) for one in differences])
    return norms.sum(0)


def image_norm(images: Tensor) -> Tensor:
    """Euclidean norm of images `[B, C, H, W]`, averaged over them; a scalar."""
    norms: Tensor = vector_norm(images.flatten(1), dim=1)
    return norms.mean()


class Smoothness:
    """Total variation of images whose borders lie elsewhere in each iteration; one batch's, to be called once in each.

    Images are rolled by one offset along both axes, so that what borders hide is smoothed as well.
    """

    def __init__(self, weight: float, jitter: int, generator: torch.Generator) -> None:
        """Take the weight, the offsets (from `-jitter` to `jitter - 1`), and their source, on the CPU."""
        self._weight = weight
        self._jitter = jitter
        self._generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """Return the loss of normalised images `[B, C, H, W]`; a scalar."""
        if self._jitter:
            offset = int(torch.randint(-self._jitter, self._jitter, (), generator=self._generator))
            images = images.roll((offset, offset), (2, 3))
        return self._weight * total_variation(images)
