"""Ranges of the halves of concatenated shortcuts: whether one grid can serve both (Q-Diffusion, arXiv:2302.04304)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import hooked
from synthquant.data.image_set import ImageSet
from synthquant.models.float_model import FloatModel
from synthquant.models.samples import Samples
from synthquant.nn.layers import first_replaced
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.nn.split_shortcuts import SplitMode
from synthquant.quantize.calibrate import CalibrationSet


@dataclass(frozen=True)
class HalfRange:
    """What one part of a split layer reads and multiplies it with."""

    layer: str
    """Name of the layer that would be split."""
    part: int
    """Which of the joined tensors, from 0."""
    channels: int
    """Its channels."""
    low: float
    """Smallest value over all samples."""
    high: float
    """Largest value over all samples."""
    deviation: float
    """Root mean square of its values."""
    weight_low: float
    """Smallest weight that it is multiplied with."""
    weight_high: float
    """Largest weight that it is multiplied with."""
    weight_deviation: float
    """Root mean square of these weights."""

    @property
    def span(self) -> float:
        """Width of the range that a grid of it covers, which holds zero."""
        return max(self.high, 0.0) - min(self.low, 0.0)

    @property
    def weight_span(self) -> float:
        """The same of its weights."""
        return max(self.weight_high, 0.0) - min(self.weight_low, 0.0)

    def row(self) -> dict[str, Any]:
        """Return it as a row of JSON."""
        return asdict(self)


@torch.no_grad()
def shortcut_ranges(
    float_model: FloatModel, samples: ImageSet | Samples, *, mode: SplitMode = "skip", count: int = 256
) -> list[HalfRange]:
    """Measure the halves of every layer that `scheme.split_shortcuts` would split, in execution order.

    Args:
        float_model: the network; left as it is.
        samples: what it is given; those of a sampler's steps come in turns of these.
        mode: which layers these are, see `QuantScheme.split_shortcuts`.
        count: how many samples to look at.

    Raises:
        UnsupportedModelError: no layer reads a concatenation of feature maps.
        DataError: no sample can be read.
    """
    model = QuantModel.build(float_model, QuantScheme.parse({"preset": "W8A8", "split_shortcuts": mode}))
    if not model.splits:
        raise UnsupportedModelError(
            f"{float_model.name}: no layer reads feature maps that were joined along their channels, so there is no"
            " shortcut to split"
        )
    watched = {part: _Values() for parts in model.splits.values() for part in parts}
    hooks = [(model.layers[name], values.see) for name, values in watched.items()]
    with model.mode(weights=False, activations=False), hooked(pre=hooks, with_kwargs=True):
        CalibrationSet(model, samples).run(model, count)
    return list(_rows(model, watched))


def _rows(model: QuantModel, watched: dict[str, _Values]) -> Iterator[HalfRange]:
    for layer, parts in model.splits.items():
        for number, name in enumerate(parts):
            read, multiplied = watched[name], _Values()
            multiplied.add(model.layers[name].float_weight)
            low, high, deviation = read.summary()
            yield HalfRange(layer, number, read.channels, low, high, deviation, *multiplied.summary())


class _Values:
    """Ends and mean square of all values seen."""

    def __init__(self) -> None:
        self.channels = 0
        self._low, self._high, self._squares, self._count = float("inf"), float("-inf"), 0.0, 0

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer is called; a pre-hook of it."""
        self.channels = int(getattr(module, "in_features" if isinstance(module, nn.Linear) else "in_channels"))
        first_replaced(self.add, args, kwargs)

    def add(self, values: Tensor) -> Tensor:
        """Look at some values; returns them."""
        self._low, self._high = min(self._low, float(values.min())), max(self._high, float(values.max()))
        self._squares += float(values.double().square().sum())
        self._count += values.numel()
        return values

    def summary(self) -> tuple[float, float, float]:
        """Smallest and largest value, and root mean square."""
        return self._low, self._high, float((self._squares / self._count) ** 0.5)
