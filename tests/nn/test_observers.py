"""Each search against a slow, obvious loop; the histogram against the values it counts."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from synthquant.core.errors import DataError
from synthquant.nn import observers
from synthquant.nn.functional import fake_quantize
from synthquant.nn.observers import OBSERVERS, PERCENTILES, ActivationHistogram, Samples

Grid = tuple[float, float]


def rows(seed: int = 0) -> torch.Tensor:
    """Two-sided, skewed, nearly one-sided, all-negative and heavy-tailed rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 30, generator=generator)
    x[1] = x[1].exp() - 0.5
    x[2] = x[2].abs() - 0.01
    x[3] = -x[3].abs() - 0.3
    x[4] = x[4] ** 3
    return x


def grid(low: float, high: float, bits: int) -> Grid:
    scale = max((high - low) / (2**bits - 1), 1e-8)
    return scale, float(2 ** (bits - 1) if low == -high else round(-low / scale))


def score(values: torch.Tensor, candidate: Grid, bits: int) -> float:
    scale, zero_point = candidate
    top = 2**bits - 1
    codes = (torch.round(values / scale) + zero_point).clamp(0, top)
    return float((scale * (codes - zero_point) - values).abs().pow(2.4).mean())


def shrinking(values: torch.Tensor, bits: int, steps: int, symmetric: bool, zero_inside: bool) -> Iterator[Grid]:
    low, high = float(values.min()), float(values.max())
    if symmetric:
        largest = max(abs(low), abs(high))
        low, high = (-largest if low < 0 else 0.0), largest
    elif zero_inside:
        low, high = min(low, 0.0), max(high, 0.0)
    for step in range(steps):
        yield grid(low * (1 - step / 100), high * (1 - step / 100), bits)


def every_zero_point(values: torch.Tensor, bits: int) -> Iterator[Grid]:
    """QDrop's search: 100 widths and, unless the values are on one side of 0, every zero point."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    for step in range(1, 101):
        yield grid(low * step / 100, high * step / 100, bits)
        if low < 0 < high:
            yield from ((max((high - low) * step / 100 / (2**bits - 1), 1e-8), float(code)) for code in range(2**bits))


@pytest.mark.parametrize(("name", "steps"), [("brecq", 80), ("genie", 100), ("minmax", 1)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("zero_inside", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_shrinking_searches_against_a_loop(
    name: str, steps: int, symmetric: bool, zero_inside: bool, bits: int
) -> None:
    x = rows()
    scale, zero_point = OBSERVERS.get(name)(Samples.of_rows(x), bits, symmetric=symmetric, zero_inside=zero_inside)
    for row, s, z in zip(x, scale.tolist(), zero_point.tolist(), strict=True):
        best = min(score(row, candidate, bits) for candidate in shrinking(row, bits, steps, symmetric, zero_inside))
        assert score(row, (s, z), bits) == pytest.approx(best, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_qdrop_against_the_search_without_skipping(bits: int) -> None:
    x = rows(1)
    scale, zero_point = OBSERVERS.get("qdrop")(Samples.of_rows(x), bits, symmetric=False, zero_inside=False)
    assert bool(((zero_point >= 0) & (zero_point <= 2**bits - 1)).all())
    for row, s, z in zip(x, scale.tolist(), zero_point.tolist(), strict=True):
        best = min(score(row, candidate, bits) for candidate in every_zero_point(row, bits))
        assert score(row, (s, z), bits) == pytest.approx(best, rel=1e-3, abs=1e-9)


def test_qdrop_symmetric_and_above_five_bits() -> None:
    x = rows(2)
    for bits, symmetric in ((4, True), (8, False)):
        scale, zero_point = OBSERVERS.get("qdrop")(Samples.of_rows(x), bits, symmetric=symmetric, zero_inside=True)
        plain, _ = OBSERVERS.get("minmax")(Samples.of_rows(x), bits, symmetric=symmetric, zero_inside=True)
        for row, s, z, whole in zip(x, scale.tolist(), zero_point.tolist(), plain.tolist(), strict=True):
            assert 0 <= z <= 2**bits - 1
            assert s <= whole * 1.0001
            widest = grid(min(float(row.min()), 0.0), max(float(row.max()), 0.0), bits)
            if not symmetric:
                assert score(row, (s, z), bits) <= score(row, widest, bits) * 1.0001


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_symmetric_grids_have_zero_in_the_middle_or_at_the_lower_end(name: str) -> None:
    x = torch.stack([rows()[0], rows()[0].abs()])
    for bits in (2, 4, 8):
        _, zero_point = OBSERVERS.get(name)(Samples.of_rows(x), bits, symmetric=True, zero_inside=True)
        assert zero_point.tolist() == [2 ** (bits - 1), 0]


@functools.cache
def signed_rows(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows, and for each the least error of a grid with its zero in the middle, of 3,000 scales."""
    generator = torch.Generator().manual_seed(bits)
    positive = torch.cat([torch.rand(20, 50, generator=generator) + 0.5, rows()[2:3].repeat(1, 2)[:, :50].abs()])
    outlier = torch.randn(20, 50, generator=generator) * 0.1
    outlier[:, 0] = 1.0
    x = torch.cat([positive, outlier, -positive, torch.randn(20, 50, generator=generator)])
    scales, middle = torch.linspace(0.002, 1.5, 3000) * x.abs().amax(), 2 ** (bits - 1)
    codes = torch.round(x[:, None] / scales[:, None]).clamp(-middle, middle - 1)
    return x, (codes * scales[:, None] - x[:, None]).abs().pow(2.4).mean(2).amin(1)


@pytest.mark.parametrize("name", ["brecq", "genie", "qdrop"])
@pytest.mark.parametrize(("bits", "allowed"), [(2, 1.02), (3, 1.05), (4, 1.3)])
def test_signed_grids_against_brute_force(name: str, bits: int, allowed: float) -> None:
    """Also rows without a negative value, and those whose largest value is one outlier: zero is in the middle."""
    x, best = signed_rows(bits)
    scale, zero_point = OBSERVERS.get(name)(Samples.of_rows(x), bits, symmetric=True, zero_inside=False, signed=True)
    middle = 2 ** (bits - 1)
    assert set(zero_point.tolist()) == {middle}
    for row, s, wanted in zip(x, scale.tolist(), best.tolist(), strict=True):
        assert score(row, (s, middle), bits) <= wanted * allowed


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_signed_grids_of_degenerate_rows(name: str) -> None:
    x = torch.tensor([[0.0, 0.0], [0.5, 0.5], [-3e-6, -3e-6], [1e30, -1e30]])
    for bits in (2, 8):
        scale, zero_point = OBSERVERS.get(name)(
            Samples.of_rows(x), bits, symmetric=True, zero_inside=False, signed=True
        )
        assert zero_point.tolist() == [2 ** (bits - 1)] * 4 and bool((scale >= 1e-8).all())
        rebuilt = fake_quantize(x, scale[:, None], zero_point[:, None], 2**bits - 1)
        assert bool(((rebuilt - x).abs() <= 0.51 * scale[:, None] + 1e-8).all())


@pytest.mark.parametrize("name", OBSERVERS.names())
@pytest.mark.parametrize("zero_inside", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_degenerate_rows(name: str, zero_inside: bool, bits: int) -> None:
    values = torch.tensor([0.0, 0.37, -250.0, 3e-6, 1e6])[:, None]
    for x in (values, values.expand(5, 7)):
        scale, zero_point = OBSERVERS.get(name)(Samples.of_rows(x), bits, symmetric=False, zero_inside=zero_inside)
        assert bool((scale >= 1e-8).all()) and bool(scale.isfinite().all() and zero_point.isfinite().all())
        assert bool(((zero_point >= 0) & (zero_point < 2**bits)).all()), "codes must not lose digits far from zero"
        rebuilt = fake_quantize(x, scale[:, None], zero_point[:, None], 2**bits - 1)
        assert torch.allclose(rebuilt, x, rtol=1e-5, atol=1e-8)


def test_rows_on_one_side_of_zero() -> None:
    x = rows()[3:4].neg()  # 0.3 and up
    for name in ("minmax", "brecq", "genie"):
        _, outside = OBSERVERS.get(name)(Samples.of_rows(x), 4, symmetric=False, zero_inside=False)
        assert float(outside) < 0, "zero is not on the grid of a row of weights, as in BRECQ and Genie"
        _, inside = OBSERVERS.get(name)(Samples.of_rows(x), 4, symmetric=False, zero_inside=True)
        assert float(inside) == 0
    assert float(OBSERVERS.get("qdrop")(Samples.of_rows(x), 4, symmetric=False, zero_inside=False)[1]) == 0


def filled(values: torch.Tensor, batch: int, bins: int = 2048) -> ActivationHistogram:
    histogram = ActivationHistogram(bins)
    for part in values.split(batch):
        histogram.observe_range(part)
    for part in values.split(batch):
        histogram.observe(part)
    return histogram


def test_histogram_does_not_depend_on_the_batches() -> None:
    x = torch.relu(torch.randn(60, 3, 4, generator=torch.Generator().manual_seed(0)))
    whole = filled(x, 60).samples()
    assert float(whole.low) == 0 and float(whole.high) == float(x.max())
    for other in (filled(x, 7).samples(), filled(x.flip(0), 16).samples()):
        assert torch.equal(whole.values, other.values)
        assert whole.counts is not None and other.counts is not None and torch.equal(whole.counts, other.counts)


def test_histogram_counts_zeros_apart_and_shares_sum_to_one() -> None:
    x = torch.tensor([0.0] * 30 + [1.0] * 10)
    samples = filled(x, 9, bins=4).samples()
    assert samples.counts is not None
    found = dict(zip(samples.values[0].tolist(), samples.counts[0].tolist(), strict=True))
    assert found == {0.0: 0.75, 0.875: 0.25}


def test_histogram_scores_as_its_values_do() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    scale, zero_point = torch.tensor([0.2]), torch.tensor([7.0])
    counted = float(filled(x, 64).samples().score(scale, zero_point, 15))
    assert counted == pytest.approx(float(Samples.of_rows(x[None]).score(scale, zero_point, 15)), rel=1e-2)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_histogram_of_a_constant(value: float) -> None:
    samples = filled(torch.full((50,), value), 8).samples()
    assert samples.values.tolist() == [[value]] and samples.counts is not None and samples.counts.tolist() == [[1.0]]


def test_histogram_counts_more_than_float32_can(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    expected = filled(x, 1000).samples().counts
    monkeypatch.setattr(observers, "_EXACT_COUNT", 64)
    found = filled(x, 1000).samples().counts
    assert expected is not None and found is not None and torch.equal(expected, found)


def test_histogram_says_what_is_wrong() -> None:
    with pytest.raises(RuntimeError, match="nothing observed"):
        ActivationHistogram().samples()
    with pytest.raises(RuntimeError, match="observe_range"):
        ActivationHistogram().observe(torch.ones(3))
    with pytest.raises(DataError, match="not finite"):
        filled(torch.tensor([1.0, float("nan")]), 2)
    assert ActivationHistogram().empty and not filled(torch.ones(3), 2).empty


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_running_ranges_are_moving_averages_over_images(batch: int) -> None:
    """Against the recursion, started without an image: `m = 0.99 m + 0.01 x`, divided by what the weights add up to."""
    x = torch.randn(40, 3, 5, generator=torch.Generator().manual_seed(2))
    x[11, 1, 2] = 60.0  # one outlier
    low = high = weight = 0.0
    for image in x.double():
        low, high = 0.99 * low + 0.01 * float(image.min()), 0.99 * high + 0.01 * float(image.max())
        weight = 0.99 * weight + 0.01
    samples = filled(x, batch).samples()
    assert samples.running is not None and float(samples.high) == 60
    found = torch.cat(samples.running)
    assert torch.allclose(found, torch.tensor([low / weight, high / weight]), rtol=1e-6)
    scale, zero_point = OBSERVERS.get("running")(samples, 8, symmetric=False, zero_inside=True)
    assert float(scale) == pytest.approx((high - low) / weight / 255, rel=1e-6)
    assert float(zero_point) == round(-low / weight / float(scale))
    weights = Samples.of_rows(x.flatten(1))
    both = [OBSERVERS.get(name)(weights, 4, symmetric=True, zero_inside=False) for name in ("running", "minmax")]
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1]), "weights have no images"


@pytest.mark.parametrize("bits", [3, 8])
def test_percentiles_against_torch(bits: int) -> None:
    values = torch.randn(3, 30_000, generator=torch.Generator().manual_seed(5)) + torch.tensor([[0.0], [4.0], [0.5]])
    values[:, :60] *= 40
    found = OBSERVERS.get("percentile")(Samples.of_rows(values), bits, symmetric=False, zero_inside=False)
    chosen = set()
    for row, *one in zip(values, *found, strict=True):
        grids = []
        for share in PERCENTILES:
            low, high = row.quantile(1 - share), row.quantile(share)
            scale = (high - low) / (2**bits - 1)
            grids.append((scale, torch.round(-low / scale)))
        errors = [float((fake_quantize(row, *grid, 2**bits - 1) - row).square().mean()) for grid in grids]
        chosen.add(errors.index(min(errors)))
        assert torch.allclose(torch.stack(one), torch.stack(grids[errors.index(min(errors))]), rtol=1e-4)
    assert chosen != {0}
    counted = filled(values[:1, 60:], 1).samples()
    for share in (0.0, 0.001, 0.2, 0.5, 0.999):
        assert float(counted.quantile(share)) == pytest.approx(float(values[0, 60:].quantile(share)), abs=0.02)


@pytest.mark.parametrize(("shape", "channel"), [((9, 4, 6, 5), 1), ((9, 12, 4), -1), ((9, 4), 1)])
@pytest.mark.parametrize("name", ["minmax", "running", "genie", "qdrop", "percentile"])
def test_histograms_of_channels_are_those_of_each_channel_alone(
    shape: tuple[int, ...], channel: int, name: str
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4)).relu()
    x = x * torch.tensor([1.0, 0.1, 30.0, 5.0]).view([4 if d == channel % len(shape) else 1 for d in range(len(shape))])
    together = ActivationHistogram(channel=channel)
    for look in (together.observe_range, together.observe):
        for part in x.split(4):
            look(part)
    search = OBSERVERS.get(name)
    scale, zero_point = search(together.samples(), 3, symmetric=False, zero_inside=True)
    assert scale.shape == zero_point.shape == (4,)
    for index in range(4):
        alone = search(filled(x.select(channel, index), 4).samples(), 3, symmetric=False, zero_inside=True)
        assert torch.allclose(scale[index], alone[0], rtol=1e-5) and torch.equal(zero_point[index], alone[1][0])
