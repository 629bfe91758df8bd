"""Quantized activations: one scale per tensor, fixed in use and learned during reconstruction."""

from __future__ import annotations

import torch
from torch import nn

from synthquant.nn.functional import SMALLEST_SCALE, fake_quantize, learned_step_quantize, random_keep
from synthquant.nn.observers import OBSERVERS, ActivationHistogram, Samples
from synthquant.nn.scheme import QuantArgs


class ActivationQuantizer(nn.Module):
    """Fake-quantizes a tensor of any shape with one `scale` (learned) and one `zero_point` (fixed).

    Attributes:
        enabled: quantize at all.
        learning: the scale takes gradients, and values are dropped with probability `1 - keep`.
        keep: probability that an element is quantized while learning (QDrop, arXiv:2203.05740: 0.5).
        lsq_gradient_scale: multiply the gradient of the scale by `1 / sqrt(numel * Q_P)` (LSQ, arXiv:1902.08153), where
            `numel` counts the whole batch (QDrop) and `Q_P` is the largest positive code of a signed or unsigned grid.
        generator: source of the drop masks.
        fixed: the grid is known beforehand (the image's) and neither calibrated nor learned.
        headroom: the calibrated range is made this much wider.
        histogram: while calibrating, what is observed instead of quantizing.
    """

    zero_point: torch.Tensor

    def __init__(self, args: QuantArgs) -> None:
        super().__init__()
        self.args = args
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(1))
        self._multiples = (0.0, float(args.top))  # of the scale: smallest and largest value
        self.calibrated = False
        self.enabled = True
        self.fixed = False
        self.headroom = 1.0
        self.learning = False
        self.keep = 1.0
        self.lsq_gradient_scale = False
        self.generator: torch.Generator | None = None
        self.histogram: ActivationHistogram | None = None
        self.observing_range = False

    @property
    def num_bits(self) -> int:
        """Bits of one code."""
        return self.args.num_bits

    @property
    def top(self) -> int:
        """The largest code."""
        return self.args.top

    @property
    def _positive_codes(self) -> float:
        """LSQ's `Q_P`: `2**(bits - 1) - 1` on a signed grid; `2**bits - 1` on an unsigned or (QDrop) asymmetric one."""
        return self._multiples[1] if self.args.symmetric else float(self.top)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantized `x`, same shape and dtype.

        Raises:
            RuntimeError: used before it was calibrated.
        """
        if self.histogram is not None:
            (self.histogram.observe_range if self.observing_range else self.histogram.observe)(x)
            return x
        if not self.enabled:
            return x
        if not self.calibrated:
            raise RuntimeError("activation quantizer used before it was calibrated")
        if not self.learning:
            return fake_quantize(x, self.scale, self.zero_point, self.top)
        keep = None if self.keep >= 1 else random_keep(x, self.keep, self.generator)
        gradient_scale = (x.numel() * self._positive_codes) ** -0.5 if self.lsq_gradient_scale else 1.0
        return learned_step_quantize(x, self.scale, *self._multiples, keep, gradient_scale)

    @torch.no_grad()
    def calibrate(self, observer: str) -> None:
        """Set scale and zero point from the histogram, and drop it.

        Args:
            observer: used where the scheme names none.

        Raises:
            RuntimeError: nothing was observed.
        """
        if self.histogram is None or self.histogram.empty:
            raise RuntimeError("activation quantizer saw no data to calibrate from")
        search = OBSERVERS.get(self.args.observer or observer)
        scale, zero_point = search(
            self.histogram.samples(), self.num_bits, symmetric=self.args.symmetric, zero_inside=True
        )
        self.histogram = None
        self.set_grid(scale * self.headroom, zero_point)

    @torch.no_grad()
    def set_grid(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Take a scale and a zero point (one element each)."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point.clamp(0, self.top))
        self._multiples = (-float(self.zero_point), self.top - float(self.zero_point))
        self.calibrated = True

    def fix(self, low: float, high: float) -> None:
        """Cover the range from `low` to `high` for good."""
        ends = self.scale.new_tensor([low]), self.scale.new_tensor([high])
        samples = Samples(torch.stack(ends, 1), None, *ends)
        self.set_grid(*OBSERVERS.get("minmax")(samples, self.num_bits, symmetric=self.args.symmetric, zero_inside=True))
        self.fixed = True

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Stop an optimiser step from taking the scale through zero."""
        self.scale.clamp_(min=SMALLEST_SCALE)

    def extra_repr(self) -> str:
        """Bits and state, for `print(model)`."""
        return f"{self.num_bits} bits, {'calibrated' if self.calibrated else 'not calibrated'}"


def hand_on(quantizer: ActivationQuantizer, x: torch.Tensor) -> torch.Tensor:
    """Quantize a tensor where it is made: later code may overwrite the result, which learning keeps for gradients."""
    y: torch.Tensor = quantizer(x)
    return y.clone() if quantizer.learning else y
