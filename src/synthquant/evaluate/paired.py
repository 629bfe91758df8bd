"""Two networks on the same images: how far they differ, with a 95% interval.

Their mistakes fall on the same hard images, so the interval of the paired difference is far narrower than what two
separate intervals suggest.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synthquant.core.errors import InputError
from synthquant.core.ranking import top_classes
from synthquant.core.rng import Rng
from synthquant.evaluate.accuracy import image_kl, wilson_interval

_RESAMPLES = 10_000
_CHUNK = 1_000  # resamples drawn at a time, which bounds the memory


@dataclass(frozen=True)
class PerImage:
    """What a network did on each of `N` images, in their order; small enough to be kept with every result."""

    correct: Tensor
    """`[N]` bool: the label got the highest logit."""
    agrees: Tensor
    """`[N]` bool: the same top class as the reference."""
    kl: Tensor
    """`[N]` float32: KL(reference || network) [nats]; NaN where a logit is not finite."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, reference: Tensor) -> PerImage:
        """Compare logits `[N, classes]` with labels `[N]` and with the reference's logits `[N, classes]`."""
        finite = torch.isfinite(logits).all(dim=1)
        top = top_classes(logits)[:, 0]
        kl = torch.where(finite, image_kl(reference, logits), torch.nan)
        return cls((top == labels) & finite, (top == top_classes(reference)[:, 0]) & finite, kl.float())

    def packed(self) -> dict[str, Any]:
        """Return JSON values: a hexadecimal digit for four images, and divergences as base64 of float16."""
        halves = self.kl.half().numpy().astype("<f2").tobytes()
        return {
            "count": len(self.correct),
            "correct": _hexadecimal(self.correct),
            "agrees": _hexadecimal(self.agrees),
            "kl": base64.b64encode(halves).decode(),
        }

    @classmethod
    def unpacked(cls, values: Mapping[str, Any]) -> PerImage:
        """Return what `packed` was made of, divergences to three digits."""
        halves = torch.frombuffer(bytearray(base64.b64decode(values["kl"])), dtype=torch.float16)
        count = values["count"]
        return cls(_bits(values["correct"], count), _bits(values["agrees"], count), halves.float())


@dataclass(frozen=True)
class Estimate:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float

    def verdict(self, at_least: float) -> str:
        """Return whether the value is `at_least` so large: `met`, `missed`, or `not decided` within the interval."""
        if self.low >= at_least:
            return "met"
        return "missed" if self.high < at_least else "not decided"


def share(values: Tensor) -> Estimate:
    """Return the share of `values` `[N]` bool that are true, with Wilson's interval."""
    hits = int(values.sum())
    return Estimate(hits / len(values), *wilson_interval(hits, len(values)))


def share_difference(first: Tensor, second: Tensor) -> Estimate:
    """Return the share of `first` minus that of `second`, both `[N]` bool on the same images.

    The interval is Newcombe's for paired shares (Statistics in Medicine 17, 1998, method 10): Wilson's intervals of
    both, put together with the correlation of the pairs. It keeps a width where no image tells the two apart.

    Raises:
        InputError: they are not of the same images.
    """
    _require_pairs(first, second)
    count = len(first)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    one, other = share(first), share(second)
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    covariance = float(both * neither - only_first * only_second)
    if covariance > 0:  # his continuity correction
        covariance = max(0.0, covariance - count / 2)
    phi = covariance / math.sqrt(margins) if margins else 0.0
    below, above = (one.value - one.low, one.high - one.value), (other.value - other.low, other.high - other.value)
    value = one.value - other.value
    down = below[0] ** 2 - 2 * phi * below[0] * above[1] + above[1] ** 2
    up = below[1] ** 2 - 2 * phi * below[1] * above[0] + above[0] ** 2
    return Estimate(value, value - math.sqrt(max(0.0, down)), value + math.sqrt(max(0.0, up)))


def mean_difference(first: Tensor, second: Tensor) -> Estimate:
    """Return the mean of `first` minus that of `second`, `[N]` on the same images, as `mean` does.

    Raises:
        InputError: they are not of the same images, or no pair is finite.
    """
    _require_pairs(first, second)
    return mean(first.double() - second.double())


def mean(values: Tensor) -> Estimate:
    """Return the mean of values `[N]`, one an image.

    The interval holds the middle 95% of 10,000 means of images drawn with repetition, the same draws for any values.
    Images with a value that is not finite are left out.

    Raises:
        InputError: no value is finite.
    """
    values = values.double()[torch.isfinite(values)]
    if not len(values):
        raise InputError("no image has finite values from both networks")
    generator = Rng(0).generator("paired difference")
    means = [
        values[torch.randint(len(values), (_CHUNK, len(values)), generator=generator)].mean(dim=1)
        for _ in range(_RESAMPLES // _CHUNK)
    ]
    low, high = torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(values.mean()), low, high)


def mean_over(runs: Sequence[Tensor]) -> Tensor:
    """Return the mean over runs (seeds) for each image, `[N]` float64."""
    return torch.stack([run.double() for run in runs]).mean(dim=0)


def _require_pairs(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise InputError(
            f"values {tuple(first.shape)} and {tuple(second.shape)} are no pairs: measure both networks on the same"
            " images"
        )


def _hexadecimal(values: Tensor) -> str:
    bits = "".join("1" if value else "0" for value in values.tolist())
    width = -(-len(bits) // 4)
    return f"{int(bits.ljust(4 * width, '0'), 2):0{width}x}"


def _bits(text: str, count: int) -> Tensor:
    bits = f"{int(text, 16):0{4 * len(text)}b}"[:count]
    return torch.tensor([bit == "1" for bit in bits])
