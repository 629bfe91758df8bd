"""FID, KID, precision and recall against closed forms, and against slow computations of another kind."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.rng import Rng
from synthquant.evaluate.feature_distances import (
    bootstrap_frechet,
    bootstrap_frechet_ratio,
    frechet_distance,
    kernel_distance,
    precision_and_recall,
    spread_around,
    unbiased_discrepancy,
)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(rows: Tensor) -> Tensor:
    """Rows whose mean is 0 and whose covariance is the identity, exactly."""
    centred = rows - rows.mean(0)
    factor = torch.linalg.cholesky(torch.cov(centred.T))
    return torch.linalg.solve_triangular(factor, centred.T, upper=False).T


def test_the_frechet_distance_of_normal_distributions_is_their_closed_form() -> None:
    one, two = whitened(seeded(500, 3)), whitened(seeded(700, 3, seed=1))
    spread_1, spread_2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 1.0])
    shift = torch.tensor([1.0, 0.0, -2.0])
    # Covariances that commute: the squared distance of means and that of standard deviations.
    found = frechet_distance(one * spread_1, two * spread_2 + shift)
    assert found == pytest.approx(5 + 1 + 0 + 4, rel=1e-9)
    turn = torch.linalg.qr(seeded(3, 3, seed=2)).Q
    assert frechet_distance(one * spread_1 @ turn, (two * spread_2 + shift) @ turn) == pytest.approx(10, rel=1e-9)


def test_the_frechet_distance_of_covariances_that_do_not_commute_is_that_of_a_root_of_their_product() -> None:
    one, two = seeded(60, 4) @ seeded(4, 4, seed=1), seeded(50, 4, seed=2) @ seeded(4, 4, seed=3) + 0.5
    covariances = [torch.cov(rows.T).numpy() for rows in (one, two)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = float((one.mean(0) - two.mean(0)).square().sum())
    expected += float(covariances[0].trace() + covariances[1].trace() - 2 * root.trace())
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one.float(), two.float()) == pytest.approx(expected, rel=1e-5), "sums are float64"


def test_equal_sets_are_at_no_frechet_distance_with_more_features_than_images_too() -> None:
    for rows in (seeded(200, 5) * 3 + 7, seeded(6, 20), seeded(5, 1)):
        assert frechet_distance(rows, rows) == pytest.approx(0, abs=1e-6 * rows.shape[1])
        assert frechet_distance(rows, rows.flip(0)) == pytest.approx(0, abs=1e-6 * rows.shape[1])


def test_the_interval_of_the_frechet_distance_is_what_other_draws_give() -> None:
    def draw(number: int) -> float:
        return frechet_distance(seeded(80, 3, seed=2 * number), seeded(80, 3, seed=2 * number + 1) + 1)

    found = bootstrap_frechet(seeded(80, 3), seeded(80, 3, seed=1) + 1, 300, Rng(0).generator("x"))
    again = bootstrap_frechet(seeded(80, 3), seeded(80, 3, seed=1) + 1, 300, Rng(0).generator("x"))
    other = bootstrap_frechet(seeded(80, 3), seeded(80, 3, seed=1) + 1, 300, Rng(1).generator("x"))
    assert found == again and found.value == other.value == draw(0) and found.low != other.low
    assert found.low < found.value < found.high
    values = torch.tensor([draw(number) for number in range(300)])
    wanted = float(values.quantile(0.975) - values.quantile(0.025))
    assert found.high - found.low == pytest.approx(wanted, rel=0.2)
    without = bootstrap_frechet(seeded(80, 3), seeded(80, 3, seed=1), 0, Rng(0).generator("x"))
    assert without.low == without.value == without.high


def test_an_interval_is_the_spread_around_the_value_and_never_below_zero() -> None:
    resampled = torch.linspace(10, 20, 101, dtype=torch.float64)
    found = spread_around(8.0, resampled)
    assert (found.low, found.high) == (pytest.approx(8 - 4.75), pytest.approx(8 + 4.75))
    assert spread_around(1.0, resampled).low == 0


def test_images_drawn_together_with_a_baseline_have_a_narrow_ratio() -> None:
    reference, noise = seeded(300, 3), seeded(300, 3, seed=1)
    baseline, images = noise + 1, noise * 1.01 + 1.05
    one = bootstrap_frechet_ratio(images, baseline, reference, 200, Rng(0).generator("x"), paired=True)
    apart = bootstrap_frechet_ratio(images, baseline, reference, 200, Rng(0).generator("x"), paired=False)
    first, second, ratio = one
    assert first.value == frechet_distance(images, reference) and second.value == frechet_distance(baseline, reference)
    assert ratio.value == first.value / second.value and ratio.low < ratio.value < ratio.high
    assert ratio.high - ratio.low < 0.1 * (apart[2].high - apart[2].low)
    same = bootstrap_frechet_ratio(baseline, baseline, reference, 50, Rng(0).generator("x"), paired=True)[2]
    assert (same.low, same.value, same.high) == (1, 1, 1)
    with pytest.raises(DataError, match="300 and 299 images are no pairs"):
        bootstrap_frechet_ratio(images, baseline[1:], reference, 5, Rng(0).generator("x"), paired=True)
    with pytest.raises(DataError, match="baseline is at distance 0"):
        bootstrap_frechet_ratio(
            seeded(9, 1), torch.zeros(9, 1), torch.zeros(9, 1), 1, Rng(0).generator("x"), paired=False
        )


def slow_discrepancy(first: Tensor, second: Tensor) -> float:
    width = first.shape[1]

    def kernel(x: Tensor, y: Tensor) -> float:
        return (sum(float(a) * float(b) for a, b in zip(x, y, strict=True)) / width + 1) ** 3

    within = [sum(kernel(a, b) for a, b in itertools.permutations(rows, 2)) / (len(rows) * (len(rows) - 1))
              for rows in (first, second)]  # fmt: skip
    across = sum(kernel(a, b) for a in first for b in second) / (len(first) * len(second))
    return sum(within) - 2 * across


def test_the_kernel_distance_is_the_slow_sum_over_pairs() -> None:
    one, two = seeded(9, 4), seeded(7, 4, seed=1) + 0.3
    assert unbiased_discrepancy(one, two) == pytest.approx(slow_discrepancy(one, two), rel=1e-9)
    whole = kernel_distance(one, two[:, :], Rng(0).generator("x"), subsets=3, subset_size=7)
    assert whole.subset_size == 7 and whole.subsets == 3 and whole.std > 0, "of the nine, seven are drawn"
    alike = kernel_distance(two, two.flip(0), Rng(0).generator("x"), subsets=3, subset_size=100)
    assert alike.subset_size == 7 and alike.std == pytest.approx(0, abs=1e-12)


def test_the_kernel_distance_of_two_halves_of_one_set_is_zero_on_average() -> None:
    found = []
    for number in range(60):
        rows = seeded(60, 4, seed=number)
        found.append(kernel_distance(rows[:30], rows[30:], Rng(0).generator("x"), subsets=4, subset_size=20).value)
    values = torch.tensor(found)
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean())) < 3 * error
    biased = torch.tensor([_biased(seeded(60, 4, seed=number)) for number in range(60)])
    assert float(biased.mean()) > 10 * error, "what would be found with the diagonal counted"
    assert (values < 0).any() and (values > 0).any()


def _biased(rows: Tensor) -> float:
    kernels = [((a @ b.T / 4 + 1) ** 3).mean() for a, b in ((rows[:30],) * 2, (rows[30:],) * 2, (rows[:30], rows[30:]))]
    return float(kernels[0] + kernels[1] - 2 * kernels[2])


def test_the_kernel_distance_of_shifted_rows_is_its_closed_form() -> None:
    # For x ~ N(0, 1) and y = m in one dimension: E(xx'+1)^3 + (m^2+1)^3 - 2 E(xm+1)^3 = 4 + (m^2+1)^3 - 2 (1 + 3 m^2).
    found = kernel_distance(seeded(4000, 1), torch.full((4000, 1), 2.0), Rng(0).generator("x"), subsets=20)
    assert found.value == pytest.approx(4 + 125 - 26, rel=0.05)


def slow_share_inside(rows: Tensor, others: Tensor, neighbours: int) -> float:
    hits = 0
    for row in rows:
        for centre in others:
            radius = sorted(float((centre - other).norm()) for other in others)[neighbours]
            if float((row - centre).norm()) <= radius:
                hits += 1
                break
    return hits / len(rows)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_the_slow_loops(neighbours: int) -> None:
    one, two = seeded(17, 3) * 0.7 + 1.5, seeded(14, 3, seed=1)
    precision, recall = precision_and_recall(one, two, neighbours)
    assert precision.value == slow_share_inside(one, two, neighbours)
    assert recall.value == slow_share_inside(two, one, neighbours)
    assert 0 < precision.value < 1 and precision.value != recall.value and precision.low < precision.value


def test_precision_falls_with_unreal_images_and_recall_with_missing_ones() -> None:
    reference = torch.cat([seeded(40, 2), seeded(40, 2, seed=1) + 100])
    half = seeded(40, 2, seed=2) * 0.5
    precision, recall = precision_and_recall(half, reference)
    assert precision.value > 0.9 and recall.value < 0.5
    precision, recall = precision_and_recall(torch.cat([reference, seeded(80, 2) - 100]), reference)
    assert precision.value == 0.5 and recall.value == 1


def test_equal_sets_have_full_precision_even_if_images_are_repeated() -> None:
    rows = (seeded(5, 64, seed=3) + 1000).repeat_interleave(6, dim=0)
    assert [found.value for found in precision_and_recall(rows, rows.flip(0))] == [1, 1]
    # The balls around rows that are repeated are points: nothing beside them is inside.
    assert [found.value for found in precision_and_recall(rows + 1e-6, rows)] == [0, 0]


def test_what_cannot_be_compared_is_one_line() -> None:
    with pytest.raises(DataError, match="1 images are too few"):
        frechet_distance(seeded(1, 4), seeded(5, 4))
    with pytest.raises(DataError, match="width 4 and 3"):
        frechet_distance(seeded(5, 4), seeded(5, 3))
    with pytest.raises(DataError, match="width 3 and 4"):
        kernel_distance(seeded(5, 4), seeded(5, 3), Rng(0).generator("x"))
    with pytest.raises(DataError, match="3 images are too few to be compared; give 4"):
        precision_and_recall(seeded(9, 4), seeded(3, 4))
    broken = seeded(9, 4)
    broken[3, 1] = torch.inf
    with pytest.raises(DataError, match="not finite"):
        frechet_distance(broken, seeded(9, 4))
