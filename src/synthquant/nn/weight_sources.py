"""Where a layer's weight comes from while it is learned; otherwise it is decoded from codes.

A source is a module that stands in its layer as `weight_source`: an optimiser finds what it learns among the network's
parameters, and so do distributed training and `state_dict`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from synthquant.nn.functional import (
    SMALLEST_SCALE,
    clip_codes,
    rectified_sigmoid,
    rectified_sigmoid_inverse,
    round_straight_through,
    scaled_gradient,
)
from synthquant.nn.weight_quantizers import WeightQuantizer


class WeightSource(nn.Module, ABC):
    """Computes a layer's weight, differentiably, from what it learns."""

    def __init__(self) -> None:
        super().__init__()
        self._held: torch.Tensor | None = None

    @abstractmethod
    def compute(self) -> torch.Tensor:
        """The weight, of the layer's shape."""

    @abstractmethod
    def decided(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `[C, G, K]` and scales `[C, G, 1]` that learning has come to; codes may lie beyond the grid."""

    def hold(self) -> None:
        """Compute the weight once, for all that reads it until the next call: what a step begins with."""
        self._held = self.compute()

    def forward(self) -> torch.Tensor:
        """The weight that is held, or a new one."""
        return self.compute() if self._held is None else self._held


class SoftRounding(WeightSource):
    """Rounding that is learned: `s (clip(B + h(V) + z, 0, quant_max) - z)`.

    `B = floor(W / s)` is fixed from the calibrated scale, so that learning `s` as well does not move it: AdaRound
    (arXiv:2004.10568, eq. 22) with `s` fixed, Genie-M (arXiv:2212.04780, section 3.2) with `s` learned. What is learned
    is the factor `s / s0` by which the calibrated scale `s0` changes, because folded batch norms make the scales of
    channels differ by orders of magnitude.

    Attributes:
        logit: `V`, `[C, G, K]`.
        factor: `s / s0`, `[C, G, 1]`.
        soft: `h(V)` of the weight that was computed last.
        num_bits: bits of a code.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    offset: torch.Tensor
    soft: torch.Tensor

    def __init__(self, quantizer: WeightQuantizer, weight: torch.Tensor, learn_scale: bool) -> None:
        """Start where `weight`, clipped to the calibrated grid of `quantizer`, lies."""
        super().__init__()
        ratio = quantizer.grouped(weight.float()) / quantizer.scale
        base = ratio.floor()
        self.logit = nn.Parameter(rectified_sigmoid_inverse(ratio - base))
        self.factor = nn.Parameter(torch.ones_like(quantizer.scale), requires_grad=learn_scale)
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())
        self.register_buffer("offset", base + quantizer.zero_point)
        self.num_bits = quantizer.num_bits
        self._layout, self._quant_max = quantizer.layout, quantizer.args.quant_max

    def compute(self) -> torch.Tensor:
        """The soft weight."""
        self.soft = rectified_sigmoid(self.logit)
        codes = torch.clamp(self.offset + self.soft, 0, self._quant_max)
        weight = (codes - self.zero_point) * (self.scale * self.factor)
        return self._layout.weight(weight.reshape(self._layout.channels, -1))

    @torch.no_grad()
    def decided(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes `B + z + 1[V >= 0]`, and the scales."""
        return self.offset + (self.logit >= 0), self.scale * self.factor

    @torch.no_grad()
    def undecided(self) -> torch.Tensor:
        """`h(V)` of the weights that rounding can change at all, flat."""
        inside = (self.offset >= 0) & (self.offset < self._quant_max)
        return rectified_sigmoid(self.logit)[inside]


class _LearnedScale(WeightSource, ABC):
    """A weight on a grid whose step is learned, as the factor by which the step it started with changes.

    Attributes:
        factor: `s / s0`, `[C, G, 1]`; above zero.
    """

    start: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, quantizer: WeightQuantizer, lsq_gradient_scale: bool) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones_like(quantizer.scale))
        self.register_buffer("start", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())
        self.num_bits = quantizer.num_bits
        self._layout, self._quant_max = quantizer.layout, quantizer.args.quant_max
        positive = self._quant_max // 2 if quantizer.args.symmetric else self._quant_max
        # Of all weights that share a step.
        sharing = quantizer.codes.numel() / quantizer.scale.numel()
        self._gradient_scale = (sharing * positive) ** -0.5 if lsq_gradient_scale else 1.0

    def compute(self) -> torch.Tensor:
        """The weight."""
        scale = self.start * scaled_gradient(self.factor, self._gradient_scale)
        codes = clip_codes(self._codes(scale), self._quant_max)
        return self._layout.weight(((codes - self.zero_point) * scale).reshape(self._layout.channels, -1))

    @torch.no_grad()
    def decided(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales as they are now."""
        scale = self.start * self.factor
        return self._codes(scale), scale

    @torch.no_grad()
    def keep_legal(self) -> None:
        """Undo what is no grid after an optimiser's step."""
        self.factor.clamp_(min=SMALLEST_SCALE)

    @property
    @abstractmethod
    def learned(self) -> nn.Parameter:
        """What is learned beside the step, `[C, G, K]`, in multiples of the step it started with."""

    @abstractmethod
    def _codes(self, scale: torch.Tensor) -> torch.Tensor:
        """Codes `[C, G, K]`, perhaps beyond the grid, with straight-through gradients."""


class LearnedStep(_LearnedScale):
    """LSQ (arXiv:1902.08153, eq. 1-3): `s (clip(round(W / s) + z, 0, quant_max) - z)`; weight and step are learned.

    The gradient is that of the identity for weights on the grid and 0 beyond; that of the step is multiplied by
    `1 / sqrt(n * Q_P)`, `n` weights to a step. What is learned is `W / s0` and `s / s0`, `s0` the step at the start,
    because folded batch norms make the weights of channels differ by orders of magnitude.
    """

    def __init__(self, quantizer: WeightQuantizer, weight: torch.Tensor, *, lsq_gradient_scale: bool = True) -> None:
        """Start from the float `weight` and the step of `quantizer`."""
        super().__init__(quantizer, lsq_gradient_scale)
        self.ratio = nn.Parameter(quantizer.grouped(weight.detach().float()) / quantizer.scale)

    @property
    def learned(self) -> nn.Parameter:
        """`W / s0`."""
        return self.ratio

    def _codes(self, scale: torch.Tensor) -> torch.Tensor:
        return round_straight_through(self.ratio * (self.start / scale)) + self.zero_point


class CodeOffsets(_LearnedScale):
    """GenQ's fine-tuning from a quantized network (arXiv:2312.05272, eq. 12-13): `s (clip(A + round(u / s), ..) - z)`.

    `A` are the codes that quantization came to, zero point and learned rounding in them, clipped or not; the offset `u`
    starts at 0, where the weight is bit for bit the decoded one. What is learned is `u / s0` and `s / s0`, see
    `LearnedStep`. The step's gradient holds whole codes, where LSQ's holds roundings; its gradient scale serves both.
    """

    codes: torch.Tensor

    def __init__(self, quantizer: WeightQuantizer, *, lsq_gradient_scale: bool = True) -> None:
        """Start from the codes and the step of `quantizer`."""
        super().__init__(quantizer, lsq_gradient_scale)
        self.register_buffer("codes", quantizer.grouped(quantizer.codes).to(torch.int16))
        self.offset = nn.Parameter(torch.zeros(self.codes.shape, device=quantizer.scale.device))

    @property
    def learned(self) -> nn.Parameter:
        """`u / s0`."""
        return self.offset

    def _codes(self, scale: torch.Tensor) -> torch.Tensor:
        return self.codes + round_straight_through(self.offset * (self.start / scale))
