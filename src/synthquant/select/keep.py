"""Which images stay, once each has a score."""

from __future__ import annotations

import torch
from torch import Tensor

from synthquant.core.errors import DataError


def checked_keep(keep: object) -> int | float:
    """Return `keep` if it is a count of at least 1 or a share above 0 and up to 1; raises `ValueError` if not."""
    if isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1:
        return keep
    if isinstance(keep, float) and 0 < keep <= 1:
        return keep
    raise ValueError("give a share above 0 and up to 1, such as 0.7, or a count of at least 1, such as 500")


def keep_best(scores: Tensor, keep: int | float, *, highest: bool, labels: Tensor | None = None) -> Tensor:
    """Return a mask, bool `[n]`, of the images with the best scores; among equal scores the first ones stay.

    Args:
        scores: `[n]`, finite.
        keep: a count, or a share (0..1) that is rounded to whole images, at least 1.
        highest: whether high scores are the good ones.
        labels: int64 `[n]`; if given, `keep` holds for each class.

    Raises:
        DataError: fewer images, or fewer of a class, than the count to keep.
    """
    groups = torch.zeros(len(scores), dtype=torch.int64) if labels is None else labels
    by_score = torch.argsort(scores, descending=highest, stable=True)
    order = by_score[torch.argsort(groups[by_score], stable=True)]
    classes, group, sizes = torch.unique_consecutive(groups[order], return_inverse=True, return_counts=True)
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[group]
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order] = rank < quotas(keep, sizes, None if labels is None else classes)[group]
    return mask


def quotas(keep: int | float, sizes: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return how many images of each group stay, int64 `[G]`.

    Args:
        keep: a count, or a share that is rounded to whole images, at least 1.
        sizes: int64 `[G]`, images in each group.
        classes: int64 `[G]`, their class numbers, for the error.

    Raises:
        DataError: a group has fewer images than the count to keep.
    """
    if isinstance(keep, float):
        return (sizes.double() * keep + 0.5).floor().clamp(min=1).long()
    if len(sizes) and int(sizes.min()) < keep:
        smallest = int(sizes.argmin())
        whose = "" if classes is None else f" of class {int(classes[smallest])}"
        raise DataError(f"{keep} images{whose} are to stay but there are {int(sizes[smallest])}; keep fewer, make more")
    return torch.full_like(sizes, keep)
