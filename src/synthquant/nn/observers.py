"""Choice of scale and zero point: what range of values a grid covers.

Each search takes `Samples`, rows of values with one count per column, so that the same code serves the weights (one
row per channel or group, every count 1) and the histogram of an activation (one row). Candidates are scored by
`mean |x - x_hat|**2.4`, the score of BRECQ, QDrop and Genie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from synthquant.core.errors import DataError
from synthquant.core.registry import Registry
from synthquant.nn.functional import SMALLEST_SCALE, fake_quantize

EXPONENT = 2.4
# `torch.histc` counts in float32, which holds whole numbers up to here.
_EXACT_COUNT = 2**24
# A row whose values differ by less than this share of their size is covered from 0: its own ends would give steps so
# small that codes lose their last digits in float32 and learning the scale moves all its weights at once.
_SAME_VALUE = 1e-4
# Above this many bits QDrop's search over zero points gives way to zero points that follow the ends of the range: the
# zero point is then finer than 1/32 of the range, and the search costs `100 * 2**bits` passes.
_FREE_ZERO_POINT_BITS = 5
PERCENTILES = (0.999, 0.9999, 0.99999)
"""Quantiles at which RepQ-ViT (arXiv:2212.08254) cuts values off: the one with the smallest squared error is taken."""
# What shares that add up to 1 may fall short of it.
_ROUNDING = 1e-6
# Share of the moving averages of ranges that the next image leaves as it is.
_DECAY = 0.99


@dataclass(frozen=True)
class Samples:
    """Rows of values to cover, one grid each.

    Attributes:
        values: `[R, K]`.
        counts: how often each value occurs, `[R, K]`, or empty for once each.
        low: smallest value of each row, `[R]`.
        high: largest value of each row, `[R]`.
        running: moving averages of the smallest and the largest value of an image, `[R]` each, if images were told
            apart.
    """

    values: torch.Tensor
    counts: torch.Tensor | None
    low: torch.Tensor
    high: torch.Tensor
    running: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of_rows(cls, rows: torch.Tensor) -> Samples:
        """Samples from a tensor `[R, K]`, each value counted once."""
        low, high = torch.aminmax(rows, dim=1)
        return cls(rows, None, low, high)

    def score(
        self, scale: torch.Tensor, zero_point: torch.Tensor, quant_max: int, exponent: float = EXPONENT
    ) -> torch.Tensor:
        """Mean of `|x - x_hat|**exponent` of each row, `[R]`."""
        rounded = fake_quantize(self.values, scale[:, None], zero_point[:, None], quant_max)
        error = rounded.sub_(self.values).abs_().pow_(exponent)
        return error.mean(1) if self.counts is None else error.mul_(self.counts).sum(1)

    def quantile(self, share: float) -> torch.Tensor:
        """The value below which this share (0..1) of a row lies, `[R]`; between two values that occur once each."""
        values, order = self.values.sort(1)
        if self.counts is None:
            place = share * (values.shape[1] - 1)
            return torch.lerp(values[:, math.floor(place)], values[:, math.ceil(place)], place % 1)
        reached = self.counts.gather(1, order).double().cumsum(1) >= share - _ROUNDING
        return values.gather(1, reached.int().argmax(1, keepdim=True))[:, 0]


@dataclass
class _Best:
    """The best candidate so far, per row."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    score: torch.Tensor

    @classmethod
    def start(cls, scale: torch.Tensor, zero_point: torch.Tensor) -> _Best:
        return cls(scale, zero_point, torch.full_like(scale, torch.inf))

    def offer(self, scale: torch.Tensor, zero_point: torch.Tensor, score: torch.Tensor) -> None:
        better = score < self.score
        self.scale = torch.where(better, scale, self.scale)
        self.zero_point = torch.where(better, zero_point, self.zero_point)
        self.score = torch.where(better, score, self.score)


Grid = tuple[torch.Tensor, torch.Tensor]


class Observer(Protocol):
    """Chooses one grid for each row of the samples."""

    def __call__(
        self, samples: Samples, bits: int, *, symmetric: bool, zero_inside: bool, signed: bool = False
    ) -> Grid:
        """Scale and zero point, `[R]` each.

        Args:
            samples: what the grids are to cover.
            bits: bits of one code.
            symmetric: zero in the middle of the grid, or at its lower end if a row has no negative value.
            signed: with `symmetric`, zero in the middle whatever the row: weights ask for it, whose rows all share one
                code for zero. Ranges are searched from the one whose largest code holds the largest value, which on a
                coarse grid is wider than the mirrored values (2 bits: -2, -1, 0, 1).
            zero_inside: zero must be a code; padding needs it, so activations ask for it.
        """


OBSERVERS: Registry[Observer] = Registry("observer")


@OBSERVERS.register("minmax")
def minmax(samples: Samples, bits: int, *, symmetric: bool, zero_inside: bool, signed: bool = False) -> Grid:
    """The whole range, from the smallest to the largest value (ZeroQ, arXiv:2001.00281)."""
    if symmetric:
        return _grid(*_mirror(samples.low, samples.high, signed), bits, signed)
    return _grid(*_ends(samples, zero_inside), bits)


@OBSERVERS.register("running")
def running(samples: Samples, bits: int, *, symmetric: bool, zero_inside: bool, signed: bool = False) -> Grid:
    """Moving averages of the smallest and the largest value of an image, which outliers hardly move (arXiv:1712.05877).

    The paper averages over the batches of training, with a factor close to 1; here it is 0.99 for each image, so that
    the size of batches does not matter, and the average of few images is not drawn to the first. Weights, which have no
    images, get their whole range.
    """
    if samples.running is not None:
        low, high = samples.running
        samples = replace(samples, low=low, high=high)
    return minmax(samples, bits, symmetric=symmetric, zero_inside=zero_inside, signed=signed)


@OBSERVERS.register("brecq")
def brecq(samples: Samples, bits: int, *, symmetric: bool, zero_inside: bool, signed: bool = False) -> Grid:
    """80 ranges that shrink both ends together, to 1.00, 0.99 ... 0.21 of the whole (BRECQ, arXiv:2102.05426)."""
    ratios = [1 - step / 100 for step in range(80)]
    best = _shrink(samples, bits, ratios, symmetric, zero_inside, signed)
    return best.scale, best.zero_point


@OBSERVERS.register("genie")
def genie(samples: Samples, bits: int, *, symmetric: bool, zero_inside: bool, signed: bool = False) -> Grid:
    """100 ranges that shrink both ends together, to 1.00, 0.99 ... 0.01 of the whole (Genie, arXiv:2212.04780)."""
    ratios = [1 - step / 100 for step in range(100)]
    best = _shrink(samples, bits, ratios, symmetric, zero_inside, signed)
    return best.scale, best.zero_point


@OBSERVERS.register("qdrop")
def qdrop(samples: Samples, bits: int, *, symmetric: bool, zero_inside: bool, signed: bool = False) -> Grid:
    """100 widths; for two-sided asymmetric grids each with every zero point (QDrop, arXiv:2203.05740).

    Zero is always a code. The search over zero points skips windows that leave the data on one side while they cut it
    on the other: the same grid shifted by whole steps covers more with the same codes, so none of them can win. Above
    5 bits the zero point follows the ends of the range instead of being searched.
    """
    widths = [step / 100 for step in range(1, 101)]
    best = _shrink(samples, bits, widths, symmetric, True, signed)
    low, high = samples.low.clamp(max=0), samples.high.clamp(min=0)
    one_sided = (low == 0) | (high == 0)
    if not symmetric and bits <= _FREE_ZERO_POINT_BITS and not bool(one_sided.all()):
        _search_zero_points(samples, bits, low, high, best)
    return best.scale, best.zero_point


@OBSERVERS.register("percentile")
def percentile(samples: Samples, bits: int, *, symmetric: bool, zero_inside: bool, signed: bool = False) -> Grid:
    """From one quantile to the other, the best of three pairs by squared error (RepQ-ViT, arXiv:2212.08254)."""
    best: _Best | None = None
    for share in reversed(PERCENTILES):
        cut = replace(samples, low=samples.quantile(1 - share), high=samples.quantile(share))
        grid = minmax(cut, bits, symmetric=symmetric, zero_inside=zero_inside, signed=signed)
        best = best or _Best.start(*grid)
        best.offer(*grid, samples.score(*grid, 2**bits - 1, exponent=2))
    assert best is not None
    return best.scale, best.zero_point


def _search_zero_points(samples: Samples, bits: int, low: torch.Tensor, high: torch.Tensor, best: _Best) -> None:
    quant_max = 2**bits - 1
    for step in range(1, 101):
        scale = ((high - low) * (step / 100) / quant_max).clamp(min=SMALLEST_SCALE)
        for code in range(quant_max + 1):
            starts_inside = -code * scale >= low - scale
            ends_inside = (quant_max - code) * scale <= high + scale
            useful = starts_inside & ends_inside
            if bool(useful.any()):
                zero_point = torch.full_like(scale, code)
                score = samples.score(scale, zero_point, quant_max)
                best.offer(scale, zero_point, torch.where(useful, score, torch.inf))


def _shrink(
    samples: Samples, bits: int, ratios: Iterable[float], symmetric: bool, zero_inside: bool, signed: bool
) -> _Best:
    """The best of ranges that are these shares of the whole."""
    signed = symmetric and signed
    if signed:
        low, high = _signed_ends(samples, bits)
    elif symmetric:
        low, high = _mirror(samples.low, samples.high)
    else:
        low, high = _ends(samples, zero_inside)
    best = _Best.start(*_grid(low, high, bits, signed))
    for ratio in ratios:
        scale, zero_point = _grid(low * ratio, high * ratio, bits, signed)
        best.offer(scale, zero_point, samples.score(scale, zero_point, 2**bits - 1))
    return best


def _ends(samples: Samples, zero_inside: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of an asymmetric range that holds every value."""
    if zero_inside:
        return samples.low.clamp(max=0), samples.high.clamp(min=0)
    low, high = samples.low, samples.high
    same = (high - low) < _SAME_VALUE * torch.maximum(low.abs(), high.abs())
    return torch.where(same, low.clamp(max=0), low), torch.where(same, high.clamp(min=0), high)


def _mirror(low: torch.Tensor, high: torch.Tensor, signed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of a symmetric range: both sides alike, or, unless it is signed, from 0 where nothing is negative."""
    largest = torch.maximum(low.abs(), high.abs())
    return -largest if signed else torch.where(low < 0, -largest, torch.zeros_like(low)), largest


def _signed_ends(samples: Samples, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of the signed grid, one code shorter above zero than below, that no value lies above."""
    low, high = _mirror(samples.low, samples.high, signed=True)
    above, below = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
    scale = torch.maximum((high - low) / (2**bits - 1), samples.high / above)
    return -below * scale, above * scale


def _grid(low: torch.Tensor, high: torch.Tensor, bits: int, signed: bool = False) -> Grid:
    """Grid from `low` to `high`, with zero in its middle if it is signed."""
    scale = ((high - low) / (2**bits - 1)).clamp(min=SMALLEST_SCALE)
    if signed:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    # The zero point of a mirrored range is a tie, which goes to the even `2**(bits - 1)`; float32 may miss the tie.
    tie = torch.full_like(low, 2 ** (bits - 1))
    zero_point = torch.where((low < 0) & (low == -high), tie, torch.round(-low / scale))
    return scale, zero_point + 0.0  # no -0.0


class Watcher(Protocol):
    """Looks at the tensors that a quantizer will quantize, twice at the same ones."""

    def observe_range(self, x: torch.Tensor) -> None:
        """First pass."""

    def observe(self, x: torch.Tensor) -> None:
        """Second pass."""

    @property
    def empty(self) -> bool:
        """Whether nothing came by in the second pass yet."""


class ActivationHistogram:
    """What an activation quantizer saw: range first, then a histogram over that range; one, or one for each channel.

    Zeros are counted on their own, because after a ReLU they are most of the values and lie on no bin's centre. The
    sums are of whole numbers, so the result does not depend on the order or the size of the batches.
    """

    def __init__(self, bins: int = 2048, channel: int | None = None) -> None:
        """Look at tensors with an image, or a part of one, in each row.

        Args:
            bins: of a histogram.
            channel: dimension of the channels that have histograms of their own; none: one histogram of all values.
        """
        self._bins = bins
        self._channel = channel
        self._low: torch.Tensor | None = None
        self._high: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        self._zeros: torch.Tensor | None = None
        self._running = torch.zeros(2, 1, dtype=torch.float64)  # sums of low and high, decayed
        self._weight = 0.0  # of these sums

    def observe_range(self, x: torch.Tensor) -> None:
        """First pass: widen the range to hold `x`."""
        rows = self._rows(x)
        of_images = torch.stack([rows.amin(2), rows.amax(2)])  # on CPUs far faster than torch.aminmax along a dimension
        low, high = of_images[0].amin(1), of_images[1].amax(1)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        count = of_images.shape[2]
        shares = (1 - _DECAY) * _DECAY ** torch.arange(count - 1, -1, -1, dtype=torch.float64, device=x.device)
        self._running = self._running.to(x.device) * _DECAY**count + (of_images.double() * shares).sum(2)
        self._weight = self._weight * _DECAY**count + (1 - _DECAY**count)

    def observe(self, x: torch.Tensor) -> None:
        """Second pass: count the values of `x`.

        Raises:
            DataError: the first pass saw values that are not finite.
        """
        if self._low is None or self._high is None:
            raise RuntimeError("observe_range must see the data before observe")
        ends = list(zip(self._low.tolist(), self._high.tolist(), strict=True))
        if not all(math.isfinite(end) for pair in ends for end in pair):
            raise DataError("the network gives values that are not finite for some calibration image")
        rows = self._rows(x).flatten(1)
        counted = [self._counted(row, *pair) for row, pair in zip(rows, ends, strict=True)]
        counts, zeros = (torch.stack(column) for column in zip(*counted, strict=True))
        self._zeros = zeros if self._zeros is None else self._zeros + zeros
        self._counts = counts if self._counts is None else self._counts + counts

    @property
    def empty(self) -> bool:
        """Whether nothing was counted yet."""
        return self._counts is None

    def samples(self) -> Samples:
        """A row for each histogram: bin centres and zero, with the share of values at each."""
        if self._low is None or self._high is None or self._counts is None or self._zeros is None:
            raise RuntimeError("nothing observed yet")
        low, high = self._low[:, None], self._high[:, None]
        width = (torch.where(high > low, high - low, torch.ones_like(low))) / self._bins
        centres = low + (torch.arange(self._bins, device=low.device, dtype=torch.float32) + 0.5) * width
        values = torch.cat([centres, torch.zeros_like(low)], 1).clamp(min=low, max=torch.maximum(high, low))
        counts = torch.cat([self._counts, self._zeros[:, None]], 1)
        used = (counts > 0).any(0)
        shares = (counts / counts.sum(1, keepdim=True))[:, used].float()
        average_low, average_high = (self._running / self._weight).float()
        return Samples(values[:, used], shares, self._low, self._high, (average_low, average_high))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[R, B, K]`: the values of `x` by histogram and row, those of a row in any order."""
        values = x.detach().float()
        if self._channel is None:
            inner = sorted(range(1, values.ndim), key=values.stride, reverse=True)  # as they lie in memory: no copy
            return values.permute(0, *inner).reshape(1, len(values), -1) if values.ndim else values.reshape(1, 1, 1)
        return values.movedim(self._channel, 0).flatten(2) if values.ndim > 2 else values.movedim(1, 0)[:, :, None]

    def _counted(self, row: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
        """How many of the values that are not 0 lie in each bin, and how many are 0."""
        high = high if high > low else low + 1
        counts = torch.zeros(self._bins, dtype=torch.float64, device=row.device)
        for start in range(0, len(row), _EXACT_COUNT):
            counts += torch.histc(row[start : start + _EXACT_COUNT], self._bins, low, high)
        zeros = len(row) - torch.count_nonzero(row).double()
        # zeros are taken out of their bin again, since picking the other values first costs more than counting all
        return counts - zeros * torch.histc(row.new_zeros(1), self._bins, low, high), zeros
