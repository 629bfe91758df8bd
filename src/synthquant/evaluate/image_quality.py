"""How good drawn images are, beside reference images: distances of features, and pairs of the same seed.

`compare_images` takes two sets, or three: images of a quantized pipeline, a reference (real images, or those of the
float pipeline), and a baseline (those of the float pipeline, where the reference is real), to whose own distance the
distance is put in relation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import Field

from synthquant.core.progress import QUIET, Progress
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.data.seed_pairs import Pairs, same_seed_pairs
from synthquant.data.sources import open_images
from synthquant.evaluate.feature_distances import (
    KernelDistance,
    bootstrap_frechet,
    bootstrap_frechet_ratio,
    kernel_distance,
    precision_and_recall,
    require_features,
    require_number,
)
from synthquant.evaluate.image_features import FeatureExtractor, ImageFeatures
from synthquant.evaluate.paired import Estimate, share, share_difference
from synthquant.evaluate.same_seed import SameSeed, compare_pairs


class QualitySettings(Settings):
    """How image sets are compared."""

    resamples: int = Field(default=200, ge=0, le=10_000)
    """How often both sets are drawn anew for the interval of the Frechet distance; 0: no interval. Each takes as long
    as the distance itself: a moment with 64 features, seconds with the 2,048 of Inception."""
    subsets: int = Field(default=100, ge=1, le=10_000)
    """Subsets over which the kernel distance is averaged."""
    subset_size: int = Field(default=1000, ge=2)
    """Images in a subset; all of a set that has fewer."""
    neighbours: int = Field(default=3, ge=1)
    """Neighbours that the balls of precision and recall reach."""
    batch_size: int = Field(default=64, ge=1)
    """Images looked at together."""


@dataclass(frozen=True)
class ClassAgreement:
    """Shares of images that the classifier puts into the class they were drawn for, with 95% intervals."""

    images: Estimate | None
    reference: Estimate | None
    difference: Estimate | None
    """The first minus the second, of pairs of the same seed."""


@dataclass(frozen=True)
class Relative:
    """The baseline's own distance to the reference, and the images' as a share of it."""

    baseline: Estimate
    """Frechet distance of the baseline."""
    ratio: Estimate
    """1: as good as the baseline."""
    paired: bool
    """Whether images and baseline were drawn anew together, by their seeds."""


@dataclass(frozen=True)
class ImageQuality:
    """What `compare_images` found; estimates have 95% intervals."""

    features: str
    """The network and which of its features; distances of different ones do not compare."""
    count: int
    """Images that could be read."""
    reference_count: int
    """Images of the reference that could be read."""
    frechet: Estimate
    """Frechet distance; with the features of Inception the FID."""
    kernel: KernelDistance
    """Kernel distance; with the features of Inception the KID."""
    precision: Estimate
    """Share of images inside the reference's manifold."""
    recall: Estimate
    """Share of the reference inside the images' manifold."""
    class_agreement: ClassAgreement | None
    """None where neither set has labels, or the network is no classifier."""
    same_seed: SameSeed | None
    """Pairs with the baseline, without one with the reference; none where no seeds are the same."""
    relative: Relative | None
    """None without a baseline."""

    def row(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Seen:
    """A set with what the network makes of it."""

    images: ImageSet
    found: ImageFeatures


def compare_images(
    images: Any,
    reference: Any,
    extractor: FeatureExtractor,
    *,
    baseline: Any = None,
    names: Mapping[str, str] | None = None,
    settings: QualitySettings | None = None,
    rng: Rng | None = None,
    progress: Progress = QUIET,
) -> ImageQuality:
    """Return how far `images` are from `reference`, in the features of `extractor` and pair by pair.

    Args:
        images: what is judged; as the others an image set, or what else `open_images` takes.
        reference: real images, or those of the float pipeline.
        extractor: whose features distances are taken in; `open_features` opens one.
        baseline: images of the float pipeline, where the reference is real.
        names: what to call `images`, `reference` and `baseline` in messages.
        settings: how much is drawn.
        rng: source of subsets and of what is drawn anew.
        progress: takes bars and warnings.

    Raises:
        DataError: there is no such set, one has too few images that can be read, or pairs of different sizes.
        MissingExtraError: torchmetrics is not installed, and there are pairs large enough for structural similarity.
    """
    how, random = settings or QualitySettings(), rng or Rng(0)
    called = {"images": "images", "reference": "reference", "baseline": "baseline", **(names or {})}
    given = {"images": images, "reference": reference, **({} if baseline is None else {"baseline": baseline})}
    sets = {name: open_images(one) for name, one in given.items()}
    for one in sets.values():
        require_number(len(one), how.neighbours + 1)
    seen = {}
    for name, one in sets.items():
        found = extractor.features(one, called[name], batch_size=how.batch_size, progress=progress)
        require_features(found.vectors, how.neighbours + 1)
        seen[name] = _Seen(one, found)
    first, second = seen["images"], seen["reference"]
    beside = seen.get("baseline", second)
    pairs = same_seed_pairs(first.images, beside.images)
    with progress.bar("resamples", how.resamples) as bar:
        if baseline is None:
            relative = None
            distance = bootstrap_frechet(
                first.found.vectors, second.found.vectors, how.resamples, random.generator("bootstrap"), bar.advance
            )
        else:
            distance, relative = _relative(first, beside, second, pairs, how, random, bar.advance)
    kernel = kernel_distance(
        first.found.vectors,
        second.found.vectors,
        random.generator("kernel subsets"),
        subsets=how.subsets,
        subset_size=how.subset_size,
    )
    precision, recall = precision_and_recall(first.found.vectors, second.found.vectors, how.neighbours)
    return ImageQuality(
        features=extractor.name,
        count=len(first.found.vectors),
        reference_count=len(second.found.vectors),
        frechet=distance,
        kernel=kernel,
        precision=precision,
        recall=recall,
        class_agreement=class_agreement(first.found, beside.found, pairs),
        same_seed=None
        if pairs is None
        else compare_pairs(
            first.images,
            beside.images,
            pairs,
            (first.found, beside.found),
            batch_size=how.batch_size,
            progress=progress,
        ),
        relative=relative,
    )


def class_agreement(images: ImageFeatures, beside: ImageFeatures, pairs: Pairs | None) -> ClassAgreement | None:
    """Return which shares of two sets the classifier puts into their class; none where neither has labels."""
    hits = [
        None if one.classes is None or one.labels is None else one.classes == one.labels for one in (images, beside)
    ]
    labelled = [None if one.labels is None else one.labels >= 0 for one in (images, beside)]
    if hits[0] is None and hits[1] is None:
        return None
    shares = [
        None if hit is None or known is None or not bool(known.any()) else share(hit[known])
        for hit, known in zip(hits, labelled, strict=True)
    ]
    difference = None
    if pairs is not None and hits[0] is not None and hits[1] is not None:
        rows = images.rows_of(pairs.first), beside.rows_of(pairs.second)
        both = (rows[0] >= 0) & (rows[1] >= 0)
        if bool(both.any()):
            difference = share_difference(hits[0][rows[0][both]], hits[1][rows[1][both]])
    return ClassAgreement(shares[0], shares[1], difference)


def _relative(
    images: _Seen,
    baseline: _Seen,
    reference: _Seen,
    pairs: Pairs | None,
    how: QualitySettings,
    rng: Rng,
    advance: Callable[[], None],
) -> tuple[Estimate, Relative]:
    """The distance of the images, and that of the baseline with the share of it; drawn together if all are pairs."""
    first, second = images.found.vectors, baseline.found.vectors
    paired = False
    if pairs is not None:
        rows = images.found.rows_of(pairs.first), baseline.found.rows_of(pairs.second)
        paired = len(pairs) == len(first) == len(second) and bool((torch.stack(rows) >= 0).all())
        if paired:
            first, second = first[rows[0]], second[rows[1]]
    distance, beside, ratio = bootstrap_frechet_ratio(
        first,
        second,
        reference.found.vectors,
        how.resamples,
        rng.generator("bootstrap"),
        paired=paired,
        advance=advance,
    )
    return distance, Relative(beside, ratio, paired)
