"""The kind of quantizer for softmaxes: powers of the square root of 2 below one scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from synthquant.core.errors import SchemeError
from synthquant.nn.activation_quantizers import QUANTIZER_KINDS, ActivationQuantizer
from synthquant.nn.functional import SMALLEST_SCALE
from synthquant.nn.observers import PERCENTILES, ActivationHistogram, Watcher

if TYPE_CHECKING:
    from synthquant.nn.scheme import QuantArgs


@QUANTIZER_KINDS.register("log_sqrt2")
class LogSqrt2Quantizer(ActivationQuantizer):
    """`scale * 2**(-q / 2)` for codes `q = round(-2 log2(x / scale))` of 0 .. 2**bits - 1, and 0 for what lies below.

    RepQ-ViT (arXiv:2212.08254), section 3.3. Values above the scale become the scale. Zero is one value more than there
    are codes, as in the authors' code: no runtime takes such tensors, and files hold them as float arithmetic.

    Attributes:
        scale: `[1]`, the largest value (learned): among three quantiles of what was seen the one with the smallest
            squared error, whatever observer is asked for.
    """

    non_negative = True

    def __init__(self, args: QuantArgs) -> None:
        super().__init__(args)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded to the grid."""
        return self._shares(x, self.scale) * self.scale

    def quantize_learning(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """The same with straight-through gradients, and `x` itself where `keep` is 0."""
        share = (x / self.scale).clamp(max=1)
        y = (self._shares(x, self.scale).detach() + share - share.detach()) * self.scale
        return y if keep is None else torch.lerp(x, y, keep)

    def new_watcher(self) -> ActivationHistogram:
        """A histogram of all values."""
        return ActivationHistogram()

    def set_range(self, watcher: Watcher, observer: str) -> None:
        """Choose the scale; raises `SchemeError` for a tensor with negative values."""
        samples = cast(ActivationHistogram, watcher).samples()
        if float(samples.low) < 0:
            raise SchemeError(
                f"kind 'log_sqrt2' quantizes what is never negative, and {float(samples.low):.3g} was seen; it is meant"
                " for scheme.attention.softmax"
            )
        best, smallest = samples.high, torch.inf
        for share in PERCENTILES:
            scale = samples.quantile(share).clamp(min=SMALLEST_SCALE)
            rounded = self._shares(samples.values, scale) * scale
            error = float(((rounded - samples.values).square() * cast(torch.Tensor, samples.counts)).sum())
            if error < smallest:
                best, smallest = scale, error
        self.scale.copy_(best * self.headroom)

    def cover(self, low: float, high: float) -> None:
        """Let the largest value be `high`."""
        self.scale.fill_(max(high, SMALLEST_SCALE))

    def _shares(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """`x`, rounded, as shares of the scale."""
        codes = torch.clamp(torch.round(-2 * torch.log2(torch.clamp(x / scale, min=0))), min=0)  # of 0 it is infinite
        return torch.where(codes < 2**self.num_bits, torch.exp2(-0.5 * codes), 0.0)
