"""Ranges of activations as moving averages over the whole calibration set (Q-Diffusion, arXiv:2302.04304).

The smallest and the largest value of each batch enter averages that keep 0.95 of what they were, as in the authors'
code. An outlier of one batch hardly moves them, and every sampler step is seen, where a first look at a few samples
sees some of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.observers import Samples
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet

_DECAY = 0.95


class RunningRange:
    """Watches tensors in batches, each of one or more calls; the average starts at the first batch."""

    def __init__(self) -> None:
        self._average: tuple[Tensor, Tensor] | None = None
        self._batch: tuple[Tensor, Tensor] | None = None

    def observe_range(self, x: Tensor) -> None:
        """Widen the range of the batch to hold `x`."""
        low, high = torch.aminmax(x.detach().float())
        if self._batch is not None:
            low, high = torch.minimum(low, self._batch[0]), torch.maximum(high, self._batch[1])
        self._batch = low, high

    def observe(self, x: Tensor) -> None:
        """There is no second pass."""

    def end_batch(self) -> None:
        """Let the range of the batch, if anything was seen in it, enter the average."""
        if self._batch is None:
            return
        low, high = self._batch
        if self._average is not None:
            low, high = (_DECAY * old + (1 - _DECAY) * new for old, new in zip(self._average, self._batch, strict=True))
        self._average, self._batch = (low, high), None

    @property
    def empty(self) -> bool:
        """Whether no batch was seen yet."""
        return self._average is None

    def samples(self) -> Samples:
        """One row: both ends of the averaged range."""
        if self._average is None:
            raise RuntimeError("no batch observed yet")
        ends = torch.stack(self._average)
        return Samples(ends[None], None, ends[:1], ends[1:])


def set_running_ranges(
    model: QuantModel, samples: CalibrationSet, names: Iterable[str], batch_size: int, *, quantized_weights: bool
) -> None:
    """Set the ranges of some activation quantizers from all samples, gone through once with no activation quantized.

    Quantizers of kinds that are not affine, that see nothing or whose grid is fixed keep the range they had.

    Args:
        model: the network; all its ranges are set already.
        samples: the calibration set.
        names: of the quantizers.
        batch_size: samples whose smallest and largest value enter the averages together.
        quantized_weights: watch the network with quantized weights instead of float ones.
    """
    found = (model.quantizers[name] for name in dict.fromkeys(names))
    watched: list[tuple[ActivationQuantizer, RunningRange]]
    watched = [(one, RunningRange()) for one in found if one.affine and not one.fixed]
    if not watched:
        return
    size = math.gcd(batch_size, samples.at_once)
    try:
        for quantizer, watcher in watched:
            quantizer.watcher, quantizer.watching_range = watcher, True
        with model.mode(weights=quantized_weights, activations=False), torch.no_grad():
            seen = 0
            for batch in samples.batches(size=size):
                batch.call(model)
                seen += len(batch)
                if seen % batch_size == 0:
                    _end_batch(watcher for _, watcher in watched)
            _end_batch(watcher for _, watcher in watched)
            for quantizer, watcher in watched:
                if not watcher.empty:
                    quantizer.set_range(watcher, "minmax")
    finally:
        for quantizer, _ in watched:
            quantizer.watcher, quantizer.watching_range = None, False


def _end_batch(watchers: Iterable[RunningRange]) -> None:
    for watcher in watchers:
        watcher.end_batch()
