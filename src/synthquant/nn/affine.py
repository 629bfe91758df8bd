"""The kind of quantizer that integer kernels know: one scale and one zero point for a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from synthquant.nn.activation_quantizers import QUANTIZER_KINDS, ActivationQuantizer, AffineGrid
from synthquant.nn.functional import fake_quantize, learned_step_quantize
from synthquant.nn.observers import OBSERVERS, ActivationHistogram, Samples, Watcher

if TYPE_CHECKING:
    from synthquant.nn.scheme import QuantArgs


@QUANTIZER_KINDS.register("affine")
class AffineQuantizer(ActivationQuantizer):
    """Evenly spaced values: one `scale` (learned) and one `zero_point` (fixed), both `[1]`, for a tensor of any shape.

    `lsq_gradient_scale` multiplies the gradient of the scale by `1 / sqrt(numel * Q_P)` (LSQ, arXiv:1902.08153), where
    `numel` counts the whole batch (QDrop) and `Q_P` is the largest positive code of a signed or unsigned grid.
    """

    affine = True
    whole_numbers = frozenset(("zero_point",))
    zero_point: torch.Tensor

    def __init__(self, args: QuantArgs) -> None:
        super().__init__(args)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(1))
        self._multiples = (0.0, float(args.quant_max))  # of the scale: smallest and largest value

    @property
    def quant_max(self) -> int:
        """The largest code."""
        return self.args.quant_max

    @property
    def _positive_codes(self) -> float:
        """LSQ's `Q_P`: `2**(bits - 1) - 1` on a signed grid; `2**bits - 1` on an unsigned or (QDrop) asymmetric one."""
        return self._multiples[1] if self.args.symmetric else float(self.quant_max)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded to the grid."""
        return fake_quantize(x, self.scale, self.zero_point, self.quant_max)

    def quantize_learning(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """The same with LSQ's gradients, and `x` itself where `keep` is 0."""
        gradient_scale = (x.numel() * self._positive_codes) ** -0.5 if self.lsq_gradient_scale else 1.0
        return learned_step_quantize(x, self.scale, *self._multiples, keep, gradient_scale)

    def new_watcher(self) -> ActivationHistogram:
        """A histogram of all values."""
        return ActivationHistogram()

    def set_range(self, watcher: Watcher, observer: str) -> None:
        """Search scale and zero point on a histogram."""
        scale, zero_point = self._search(cast(ActivationHistogram, watcher).samples(), observer)
        self.set_grid(scale * self.headroom, zero_point)

    def cover(self, low: float, high: float) -> None:
        """Span the range from `low` to `high`."""
        ends = self.scale.new_tensor([low]), self.scale.new_tensor([high])
        self.set_grid(*self._search(Samples(torch.stack(ends, 1), None, *ends), "minmax"))

    @torch.no_grad()
    def set_grid(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Take a scale and a zero point (one element each)."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point.clamp(0, self.quant_max))
        self._multiples = (-float(self.zero_point), self.quant_max - float(self.zero_point))
        self.calibrated = True

    def load_grid(self, grid: Mapping[str, torch.Tensor]) -> None:
        """Take a grid that `grid` gave."""
        self.set_grid(grid["scale"], grid["zero_point"].to(self.zero_point))

    def affine_grid(self) -> AffineGrid:
        """The grid as integer kernels take it."""
        return AffineGrid(self.scale.detach().float().reshape(()), int(self.zero_point), self.quant_max)

    def _search(self, samples: Samples, observer: str) -> tuple[torch.Tensor, torch.Tensor]:
        search = OBSERVERS.get(observer)
        args = self.args
        return search(samples, self.num_bits, symmetric=args.symmetric, zero_inside=True, signed=args.signed)
