"""Quantized weights: integer codes with their scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from synthquant.core.errors import SchemeError
from synthquant.core.modules import keeping_dtype
from synthquant.nn.functional import dequantize, quantize
from synthquant.nn.observers import OBSERVERS, Samples
from synthquant.nn.scheme import QuantArgs


@dataclass(frozen=True)
class WeightLayout:
    """How a weight tensor is seen as `[rows, groups, elements]`, one output channel a row.

    Attributes:
        shape: shape of the weight.
        transposed_groups: number of convolution groups of a transposed convolution, whose weight is
            `[in, out / groups, ...]`; 0 for every other layer, whose output channels come first.
    """

    shape: tuple[int, ...]
    transposed_groups: int = 0

    @property
    def channels(self) -> int:
        """Output channels."""
        return self.shape[1] * self.transposed_groups if self.transposed_groups else self.shape[0]

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with output channels first, `[channels, elements per channel]`."""
        if not self.transposed_groups:
            return weight.reshape(self.channels, -1)
        split = weight.reshape(self.transposed_groups, -1, *self.shape[1:])
        return split.transpose(1, 2).reshape(self.channels, -1)

    def weight(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `rows`."""
        if not self.transposed_groups:
            return rows.reshape(self.shape)
        inputs = self.shape[0] // self.transposed_groups
        split = rows.reshape(self.transposed_groups, self.shape[1], inputs, *self.shape[2:])
        return split.transpose(1, 2).reshape(self.shape)


class WeightQuantizer(nn.Module):
    """Codes, scales and zero points of one weight tensor.

    `codes` has the weight's shape, `scale` and `zero_point` are `[C, G, 1]` (`C` = 1 with strategy `tensor`, `G` = 1
    without groups). The codes are what the quantized network *is*: every forward pass decodes them, so a reloaded
    network gives the same bits. Codes that learning put beyond the grid may be kept, for learning that moves scales
    later; then `codes` are int16 instead of uint8, and clipped where they are decoded.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    codes: torch.Tensor

    def __init__(self, layout: WeightLayout, args: QuantArgs, name: str = "weight") -> None:
        """Zero codes and unit scales.

        Args:
            layout: the weight's shape and kind.
            args: bits, symmetry, strategy.
            name: the layer, for error messages.

        Raises:
            SchemeError: the group size does not divide an output channel.
        """
        super().__init__()
        self.layout = layout
        self.args = args
        per_channel = math.prod(layout.shape) // layout.channels
        groups = 1
        if args.group_size is not None:
            if per_channel % args.group_size:
                raise SchemeError(
                    f"{name}: group_size {args.group_size} does not divide the {per_channel} weights of an output"
                    " channel; ignore this layer or override its group_size"
                )
            groups = per_channel // args.group_size
        rows = 1 if args.strategy == "tensor" else layout.channels
        self._view = (rows, groups, -1)
        self.dtype = torch.float32
        self.register_buffer("scale", torch.ones(rows, groups, 1))
        self.register_buffer("zero_point", torch.zeros(rows, groups, 1))
        self.register_buffer("codes", torch.zeros(layout.shape, dtype=torch.uint8))

    @property
    def num_bits(self) -> int:
        """Bits of one code."""
        return self.args.num_bits

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale inside an output channel, or none."""
        return self.args.group_size

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the weight's shape as `[C, G, K]`, to broadcast against `scale`."""
        return self.layout.rows(weight).reshape(self._view)

    def ungrouped(self, grouped: torch.Tensor) -> torch.Tensor:
        """The inverse of `grouped`."""
        return self.layout.weight(grouped.reshape(self.layout.channels, -1))

    @torch.no_grad()
    def calibrate(self, weight: torch.Tensor, observer: str) -> None:
        """Search scales and zero points for `weight` and round it to nearest.

        Args:
            weight: the float weight.
            observer: used where the scheme names none.
        """
        grouped = self.grouped(weight.float())
        search = OBSERVERS.get(self.args.observer or observer)
        samples = Samples.of_rows(grouped.reshape(-1, grouped.shape[-1]))
        scale, zero_point = search(
            samples, self.num_bits, symmetric=self.args.symmetric, zero_inside=False, signed=True
        )
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))
        self.set_codes(quantize(grouped, self.scale, self.zero_point, self.args.quant_max))

    @torch.no_grad()
    def set_codes(self, grouped: torch.Tensor, scale: torch.Tensor | None = None, *, unclipped: bool = False) -> None:
        """Take new codes and, if given, new scales.

        Args:
            grouped: whole numbers of any dtype, `[C, G, K]`.
            scale: `[C, G, 1]`.
            unclipped: keep codes beyond 0 .. quant_max, as far as int16 goes.
        """
        limits = torch.iinfo(torch.int16) if unclipped else None
        low, high = (0, self.args.quant_max) if limits is None else (limits.min, limits.max)
        codes = self.ungrouped(grouped).clamp(low, high)
        self.load_codes(codes.to(torch.int16 if unclipped else torch.uint8))
        if scale is not None:
            self.scale.copy_(scale)

    @torch.no_grad()
    def load_codes(self, codes: torch.Tensor) -> None:
        """Take codes as they were kept: of the weight's shape, uint8 or (unclipped) int16."""
        self.make_room_for(codes)
        self.codes.copy_(codes)

    def make_room_for(self, codes: torch.Tensor) -> None:
        """Let codes be uint8 or int16, as those are."""
        if codes.dtype != self.codes.dtype and codes.dtype in (torch.uint8, torch.int16):
            self.codes = torch.zeros_like(self.codes, dtype=codes.dtype)

    @property
    def unclipped(self) -> bool:
        """Whether codes may lie beyond the grid."""
        return self.codes.dtype == torch.int16

    @property
    def clipped_codes(self) -> torch.Tensor:
        """The codes on the grid, uint8."""
        return self.codes.clamp(0, self.args.quant_max).to(torch.uint8) if self.unclipped else self.codes

    def forward(self) -> torch.Tensor:
        """The decoded weight, computed in float32."""
        weight = self.ungrouped(dequantize(self.grouped(self.clipped_codes), self.scale, self.zero_point))
        return weight if weight.dtype == self.dtype else weight.to(self.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move, but keep scales in float32; the weight follows the dtype of the network."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.scale.device)).dtype
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Bits and strategy, for `print(model)`."""
        return f"{self.num_bits} bits, {self.args.strategy}"
