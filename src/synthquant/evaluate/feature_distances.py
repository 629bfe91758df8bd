"""How far two sets of images lie apart, as distributions of features: FID, KID, precision and recall.

Features are rows `[N, D]` of any network; all sums are float64. Distances of different features do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.evaluate.paired import Estimate, share

_ROWS = 256  # whose distances to all others exist at a time, which bounds the memory
_INTERVAL = torch.tensor([0.025, 0.975], dtype=torch.float64)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features: the normal distribution fitted to them."""

    mean: Tensor
    """float64 `[D]`."""
    covariance: Tensor
    """float64 `[D, D]`, with N - 1 in the denominator."""

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Return those of features `[N, D]`; raises `DataError` for fewer than two rows or values not finite."""
        require_features(features, 2)
        rows = features.double()
        return cls(rows.mean(0), torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1]))


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance of normal distributions fitted to two sets of features `[N, D]` (arXiv:1706.08500).

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`. With Inception's features this is the FID. It grows the fewer
    images there are, so that only distances of equal numbers compare.

    Raises `DataError` for fewer than two rows, other widths or values that are not finite.
    """
    return _frechet(Moments.of(first), Moments.of(second))


def bootstrap_frechet(
    first: Tensor,
    second: Tensor,
    resamples: int,
    generator: torch.Generator,
    advance: Callable[[], None] = lambda: None,
) -> Estimate:
    """Return the Frechet distance of `[N, D]` and `[M, D]` with an interval of 95%.

    Both sets are drawn anew with repetition `resamples` times. A resample holds fewer different images, so that its
    distance is larger; the interval is therefore the spread of those distances around the value: what another draw of
    as many images would have given. `advance` is called after each.

    Raises as `frechet_distance` does.
    """
    value = frechet_distance(first, second)
    found = []
    for _ in range(resamples):
        picked = [rows[_with_repetition(len(rows), generator)] for rows in (first, second)]
        found.append(frechet_distance(picked[0], picked[1]))
        advance()
    return spread_around(value, torch.tensor(found, dtype=torch.float64))


def bootstrap_frechet_ratio(
    images: Tensor,
    baseline: Tensor,
    reference: Tensor,
    resamples: int,
    generator: torch.Generator,
    *,
    paired: bool,
    advance: Callable[[], None] = lambda: None,
) -> tuple[Estimate, Estimate, Estimate]:
    """Return distances of `images` and of `baseline` to `reference`, and the first as a share of the second.

    All three sets are drawn anew as in `bootstrap_frechet`. With `paired` row i of `images` and of `baseline` are of
    one seed and are drawn together, which makes the interval of their ratio far narrower.

    Raises `DataError` as `frechet_distance` does, if `paired` sets differ in number, or if the baseline is at
    distance 0.
    """
    if paired and len(images) != len(baseline):
        raise DataError(f"{len(images)} and {len(baseline)} images are no pairs")
    values = torch.tensor([frechet_distance(one, reference) for one in (images, baseline)], dtype=torch.float64)
    if values[1] == 0:
        raise DataError("the baseline is at distance 0 from the reference, so nothing can be a share of that")
    found = []
    for _ in range(resamples):
        real = reference[_with_repetition(len(reference), generator)]
        chosen = _with_repetition(len(images), generator)
        others = chosen if paired else _with_repetition(len(baseline), generator)
        found.append([frechet_distance(images[chosen], real), frechet_distance(baseline[others], real)])
        advance()
    drawn = torch.tensor(found, dtype=torch.float64).reshape(-1, 2)
    centred = (drawn - drawn.mean(0) + values).clamp_min(0)
    ratio = float(values[0] / values[1])
    ratios = centred[:, 0] / centred[:, 1].clamp_min(torch.finfo(torch.float64).tiny)
    low, high = _ends(ratios, ratio)
    first, second = (spread_around(float(value), drawn[:, place]) for place, value in enumerate(values))
    return first, second, Estimate(ratio, low, high)


@dataclass(frozen=True)
class KernelDistance:
    """Kernel Inception distance (arXiv:1801.01401): an unbiased estimate, which can be below 0."""

    value: float
    """Mean over subsets."""
    std: float
    """Standard deviation over subsets: how much a subset of that size tells, not how sure the mean is."""
    subsets: int
    """How often subsets were drawn."""
    subset_size: int
    """Images in a subset of each set."""


def kernel_distance(
    first: Tensor, second: Tensor, generator: torch.Generator, *, subsets: int = 100, subset_size: int = 1000
) -> KernelDistance:
    """Return the squared maximum mean discrepancy of features `[N, D]` and `[M, D]` under `(x.y / D + 1)^3`.

    It is the mean of unbiased estimates on `subsets` pairs of subsets of up to `subset_size` images, each drawn without
    repetition (arXiv:1801.01401). Of equal distributions it is 0 on average whatever the number of images.

    Raises `DataError` for fewer than two rows, other widths or values that are not finite.
    """
    require_features(first, 2)
    require_features(second, 2, first.shape[1])
    size = min(subset_size, len(first), len(second))
    found = []
    for _ in range(subsets):
        one, two = (rows[torch.randperm(len(rows), generator=generator)[:size]].double() for rows in (first, second))
        found.append(unbiased_discrepancy(one, two))
    values = torch.tensor(found, dtype=torch.float64)
    return KernelDistance(float(values.mean()), float(values.std(unbiased=False)), subsets, size)


def unbiased_discrepancy(first: Tensor, second: Tensor) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy of rows `[N, D]` and `[M, D]`.

    `sum_{i!=j} k(x_i, x_j) / (N (N - 1)) + sum_{i!=j} k(y_i, y_j) / (M (M - 1)) - 2 mean k(x_i, y_j)` with
    `k(x, y) = (x.y / D + 1)^3` (arXiv:1801.01401, section 4).
    """
    return (
        _without_diagonal(_kernel(first, first))
        + _without_diagonal(_kernel(second, second))
        - 2 * float(_kernel(first, second).mean())
    )


def precision_and_recall(images: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[Estimate, Estimate]:
    """Return the improved precision and recall of features `[N, D]` against `[M, D]` (arXiv:1904.06991).

    A set's manifold is the union of balls around its rows that reach their `neighbours`-th nearest other row. Precision
    is the share of `images` inside the reference's manifold (are they real?), recall the share of the reference inside
    the images' (is all that is real among them?). Intervals are Wilson's, the manifolds being given. Both depend on
    the number of images.

    Raises `DataError` for sets of no more than `neighbours` rows, other widths or values that are not finite.
    """
    require_features(images, neighbours + 1)
    require_features(reference, neighbours + 1, images.shape[1])
    one, two = images.double(), reference.double()
    radii = [_radii(rows, neighbours) for rows in (one, two)]
    return share(_inside(one, two, radii[1])), share(_inside(two, one, radii[0]))


def spread_around(value: float, resampled: Tensor) -> Estimate:
    """Return a value that is 0 or more with the middle 95% of `resampled` `[R]`, moved to have their mean there.

    Without resamples the interval is the value itself.
    """
    moved = resampled - resampled.mean() + value if len(resampled) else resampled
    return Estimate(value, *_ends(moved.clamp_min(0), value))


def require_features(features: Tensor, least: int, width: int | None = None) -> None:
    """Raise `DataError` unless these are at least so many finite rows `[N, D]`, of this width."""
    require_number(len(features), least)
    if width is not None and features.shape[1] != width:
        raise DataError(f"features of width {features.shape[1]} and {width} are not of one network")
    if not bool(torch.isfinite(features).all()):
        raise DataError("features of some images are not finite; look at the images, or choose another network")


def require_number(count: int, least: int) -> None:
    """Raise `DataError` for fewer images than are needed."""
    if count < least:
        raise DataError(f"{count} images are too few to be compared; give {least} or more")


def _frechet(one: Moments, two: Moments) -> float:
    """The trace of the root is the sum of the roots of the eigenvalues of the symmetric `C1^(1/2) C2 C1^(1/2)`."""
    if one.mean.shape != two.mean.shape:
        raise DataError(f"features of width {len(one.mean)} and {len(two.mean)} are not of one network")
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ two.covariance @ root).clamp_min(0).sqrt().sum()
    means = (one.mean - two.mean).square().sum()
    return max(0.0, float(means + one.covariance.trace() + two.covariance.trace() - 2 * mixed))


def _with_repetition(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (count,), generator=generator)


def _ends(values: Tensor, value: float) -> tuple[float, float]:
    if not len(values):
        return value, value
    low, high = torch.quantile(values, _INTERVAL).tolist()
    return low, high


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _without_diagonal(kernel: Tensor) -> float:
    count = len(kernel)
    return float((kernel.sum() - kernel.diagonal().sum()) / (count * (count - 1)))


def _distances(rows: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Euclidean distances of rows to all others, some rows at a time; equal rows are at distance 0 exactly."""
    for start in range(0, len(rows), _ROWS):
        yield torch.cdist(rows[start : start + _ROWS], others, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its `neighbours`-th nearest other row: itself is the nearest."""
    return torch.cat([apart.kthvalue(neighbours + 1, dim=1).values for apart in _distances(rows, rows)])


def _inside(rows: Tensor, others: Tensor, radii: Tensor) -> Tensor:
    """Whether each row lies in a ball around any of the others."""
    return torch.cat([(apart <= radii).any(dim=1) for apart in _distances(rows, others)])
