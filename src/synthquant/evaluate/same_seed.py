"""How far two pipelines take the same noise apart: images of the same seed and prompt, pair by pair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.seed_pairs import Pairs
from synthquant.evaluate.image_features import ImageFeatures
from synthquant.evaluate.paired import Estimate, mean, share
from synthquant.evaluate.torch_metrics import SMALLEST_SIDE, structural_similarity


@dataclass(frozen=True)
class SameSeed:
    """Distances of pairs, each with a 95% interval; none where a measure does not apply."""

    pairs: int
    """Pairs that both sets could read."""
    identical: int
    """Pairs without any difference, whose signal-to-noise ratio is infinite; the mean of `psnr` leaves them out."""
    psnr: Estimate | None
    """Peak signal-to-noise ratio [dB], of pixels in 0..1; higher is nearer."""
    ssim: Estimate | None
    """Structural similarity; 1 for equal images."""
    feature_distance: Estimate
    """Euclidean distance of features, as a share of the root mean square distance of two images of the reference."""
    same_class: Estimate | None
    """Share of pairs that the classifier puts into one class."""

    def row(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def compare_pairs(
    images: ImageSet,
    reference: ImageSet,
    pairs: Pairs,
    features: tuple[ImageFeatures, ImageFeatures],
    *,
    batch_size: int = 64,
    progress: Progress = QUIET,
) -> SameSeed:
    """Return how far the pairs of two sets are apart; `features` are those of both.

    Raises:
        DataError: pairs are of different sizes, or none can be read in both sets.
        MissingExtraError: torchmetrics is not installed and the images are large enough for structural similarity.
    """
    rows = [one.rows_of(place) for one, place in zip(features, (pairs.first, pairs.second), strict=True)]
    readable = (rows[0] >= 0) & (rows[1] >= 0)
    if not bool(readable.any()):
        raise DataError("none of the images of the same seed can be read in both sets")
    one, two = (found.vectors[row[readable]].double() for found, row in zip(features, rows, strict=True))
    errors, similarities = [], []
    with progress.bar("compare images of the same seed", len(pairs)) as bar:
        for first, second in _pixels(images, reference, pairs, batch_size):
            errors.append((first - second).square().flatten(1).double().mean(1))
            if min(first.shape[2:]) >= SMALLEST_SIDE:
                similarities.append(structural_similarity(first, second))
            bar.advance(len(first))
    mse = torch.cat(errors)
    ratio = -10 * torch.log10(mse[mse > 0])
    scale = (2 * features[1].vectors.double().var(dim=0).sum()).sqrt()
    apart = (one - two).norm(dim=1) / scale
    tops = [
        None if found.classes is None else found.classes[row[readable]]
        for found, row in zip(features, rows, strict=True)
    ]
    return SameSeed(
        pairs=int(readable.sum()),
        identical=int((mse == 0).sum()),
        psnr=mean(ratio) if len(ratio) else None,
        ssim=mean(torch.cat(similarities)) if similarities else None,
        feature_distance=mean(apart),
        same_class=None if tops[0] is None or tops[1] is None else share(tops[0] == tops[1]),
    )


def _pixels(images: ImageSet, reference: ImageSet, pairs: Pairs, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Both images of each pair, float32 `[B, C, H, W]` in 0..1; pairs of which one cannot be read are left out."""
    for start in range(0, len(pairs), batch_size):
        places = [one[start : start + batch_size].tolist() for one in (pairs.first, pairs.second)]
        read = [_by_index(one, place) for one, place in zip((images, reference), places, strict=True)]
        both = [(read[0][a], read[1][b]) for a, b in zip(*places, strict=True) if a in read[0] and b in read[1]]
        for first, second in both:
            if first.shape != second.shape:
                sizes = [f"{list(one.shape)}" for one in (first, second)]
                raise DataError(f"images of the same seed are {sizes[0]} and {sizes[1]}; draw both in one size")
        for shape in dict.fromkeys(first.shape for first, _ in both):
            group = [pair for pair in both if pair[0].shape == shape]
            yield torch.stack([first for first, _ in group]), torch.stack([second for _, second in group])


def _by_index(images: ImageSet, indices: list[int]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for batch in images.batches(len(indices), indices):
        for index, image in zip(batch.indices, batch.images, strict=True):
            found[index] = (
                image.float() / 255 if image.dtype == torch.uint8 else image.float().nan_to_num(0).clamp(0, 1)
            )
    return found
