"""Codes and scales of a quantized network in the forms that files hold.

Inside synthquant every grid has unsigned codes `0 .. quant_max` and a zero point. Runtimes want them shifted: a weight
as `code - zero_point`, so that its zero point is 0, an activation in `uint8` or, shifted by its zero point, in `int8`.
All of this is exact; where a grid does not fit, `SchemeError` names it and says what to change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from synthquant.core.errors import SchemeError
from synthquant.export.presets import Preset
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.weight_quantizers import WeightQuantizer

# Two products of a uint8 and an int8 are summed in 16 bits on CPUs without VNNI: 7-bit weights cannot overflow there.
_LARGEST_SAFE_CODE = 64


@dataclass(frozen=True)
class ActivationGrid:
    """One activation grid as QuantizeLinear takes it.

    Attributes:
        scale: float32, no dimensions.
        zero_point: no dimensions, in the type of the codes.
        low: smallest value of the grid where the container reaches further down, no dimensions; else none.
        high: largest value of the grid where the container reaches further up, no dimensions; else none.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor | None
    high: Tensor | None


@dataclass(frozen=True)
class WeightGrid:
    """One weight as DequantizeLinear takes it.

    Attributes:
        codes: the weight's shape, or with `block` `[channels, elements per channel]`.
        scale: float32: no dimensions, `[channels]`, or with `block` `[channels, blocks]`.
        zero_point: as `scale`, in the type of the codes.
        axis: the dimension of `codes` that `scale` follows; none for one scale.
        block: codes along `axis` that share a scale; none for all.
        packed_bits: bits of one code in the file; none: as its type.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    block: int | None = None
    packed_bits: int | None = None

    def transposed(self) -> WeightGrid:
        """The grid of the transposed matrix."""
        flip = {None: None, 0: 1, 1: 0}
        blocked = self.block is not None
        return WeightGrid(
            self.codes.t().contiguous(),
            self.scale.t().contiguous() if blocked else self.scale,
            self.zero_point.t().contiguous() if blocked else self.zero_point,
            flip[self.axis],
            self.block,
            self.packed_bits,
        )


def require_expressible(args: QuantArgs, name: str, preset: Preset) -> None:
    """Raise `SchemeError` if a preset cannot express an activation quantizer, whatever its range; names it."""
    if not preset.takes(args.kind):
        raise SchemeError(
            f"preset {preset.name} cannot express {name}: integer kernels have no quantizer of kind {args.kind!r}; use"
            " kind 'affine' there, or preset simulate"
        )
    if args.num_bits > 8 and not preset.wide_activations:
        raise SchemeError(
            f"preset {preset.name} cannot express {name}: {args.num_bits}-bit activations run in float there;"
            " give them 8 bits or fewer, or use preset simulate"
        )


def require_fit(args: QuantArgs, name: str, preset: Preset) -> None:
    """Raise `SchemeError` unless a preset can express an activation quantizer whatever its range turns out to be."""
    require_expressible(args, name, preset)
    if not preset.holds_activations(args):
        raise SchemeError(
            f"preset {preset.name} may not express {name}: codes of {args.num_bits} bits are int8 with zero point 0"
            " there; give it symmetric=true and signed=true, or 7 bits"
        )


def require_weights_fit(args: QuantArgs, name: str, preset: Preset, *, packed: bool = False) -> None:
    """Raise `SchemeError` unless a preset can express a layer's weight whatever its range turns out to be.

    Args:
        args: how it is quantized.
        name: the layer, for messages.
        preset: what the runtime takes.
        packed: in a form that 4-bit types hold, for weight-only layers.
    """
    if args.strategy == "group" and not packed:
        _require_no_groups(name, preset)
    if not preset.holds_weights(args):
        raise SchemeError(
            f"preset {preset.name} may not express the weights of {name}: integer kernels take codes around zero, and"
            " ranges of asymmetric ones can lie elsewhere; set weights.symmetric=true there"
        )


def activation_grid(quantizer: ActivationQuantizer, name: str, preset: Preset) -> ActivationGrid | None:
    """Return the grid of an activation quantizer; none if it is of a kind that runs as tensor arithmetic.

    Raises:
        SchemeError: the preset cannot express it; says why, and names it.
    """
    require_expressible(quantizer.args, name, preset)
    if not quantizer.affine:
        return None
    grid = quantizer.affine_grid()
    scale, zero, largest = grid.scale, grid.zero_point, grid.quant_max
    if quantizer.num_bits > 8:
        return ActivationGrid(scale, torch.tensor(zero, dtype=torch.uint16), None, None)
    if preset.activations == "uint8":
        high = None if largest == 255 else scale * (largest - zero)
        return ActivationGrid(scale, torch.tensor(zero, dtype=torch.uint8), None, high)
    if -zero < -128 or largest - zero > 127:
        raise SchemeError(
            f"preset {preset.name} cannot express {name}: its grid runs from {-zero} to {largest - zero} steps, and"
            " int8 with zero point 0 holds -128 to 127; quantize with scheme.input_activations.symmetric=true, where"
            " tensors that are never negative get 7 bits by scheme.input_activations.num_bits or an override"
        )
    low = None if zero == 128 else scale * -zero
    high = None if largest - zero == 127 else scale * (largest - zero)
    return ActivationGrid(scale, torch.tensor(0, dtype=torch.int8), low, high)


def weight_grid(quantizer: WeightQuantizer, name: str, preset: Preset, *, packed: bool = False) -> WeightGrid:
    """Return the grid of a layer's weight, with one scale for each output channel, group or for all.

    Args:
        quantizer: codes and scales.
        name: the layer, for messages.
        preset: what the runtime takes.
        packed: in a form that 4-bit types hold, for weight-only layers.

    Raises:
        SchemeError: the preset cannot express it; says why, and names the layer.
    """
    if packed:
        return _packed(quantizer, name, preset)
    grouped = quantizer.grouped(quantizer.clipped_codes)
    signed = grouped.int() - quantizer.zero_point.int()
    low, high = int(signed.min()), int(signed.max())
    if not preset.exact_weights:
        if quantizer.group_size is not None:
            _require_no_groups(name, preset)
        if low < -128 or high > 127:
            raise SchemeError(
                f"preset {preset.name} cannot express the weights of {name}: they are {quantizer.num_bits}-bit"
                f" asymmetric and need {low} to {high} around their zero point, int8 holds -128 to 127; quantize with"
                " scheme.weights.symmetric=true, or use preset simulate"
            )
        shift = _spare_bits(max(-low, high)) if preset.bias == "accumulator" else 0
        return _arranged(quantizer, signed * 2**shift, quantizer.scale / 2**shift, None, torch.int8)
    if low >= -128 and high <= 127:
        return _arranged(quantizer, signed, quantizer.scale, None, torch.int8)
    zero = quantizer.zero_point
    if bool(((zero >= 0) & (zero <= 255)).all()):
        return _arranged(quantizer, grouped, quantizer.scale, zero, torch.uint8)
    # a channel far from zero: its zero point is outside every 8-bit type
    return _arranged(quantizer, signed, quantizer.scale, None, torch.int16 if _fits_int16(low, high) else torch.int32)


def _require_no_groups(name: str, preset: Preset) -> None:
    if not preset.exact_weights:
        raise SchemeError(
            f"preset {preset.name} cannot express the weights of {name}: integer kernels take one scale for each"
            " output channel, not groups; use strategy channel there, or preset simulate"
        )


def exact_bias_scale(bias: Tensor) -> Tensor:
    """Return float64 scales `[C]` by which a float32 bias `[C]` divides into whole numbers below 2**24: powers of 2."""
    _, exponent = torch.frexp(bias.double())
    # below 2**-126 float32 has no full precision, and neither has the scale
    return torch.ldexp(torch.ones_like(bias, dtype=torch.float64), (exponent - 24).clamp(min=-126))


def _spare_bits(largest: int) -> int:
    """How often the codes can be doubled inside 7 bits: with finer sums, the bias loses less when rounded to them."""
    return max(0, math.floor(math.log2(_LARGEST_SAFE_CODE / largest))) if largest else 0


def _fits_int16(low: int, high: int) -> bool:
    return low >= -(2**15) and high < 2**15


def _packed(quantizer: WeightQuantizer, name: str, preset: Preset) -> WeightGrid:
    """Codes for int4 with zero point 0 or, where they do not fit, for uint4 with zero points beside them."""
    grouped = quantizer.grouped(quantizer.clipped_codes)
    zero = quantizer.zero_point
    signed = grouped.int() - zero.int()
    if int(signed.min()) >= -8 and int(signed.max()) <= 7:
        return _arranged(quantizer, signed, quantizer.scale, None, torch.int8, packed_bits=4)
    if not bool(((zero >= 0) & (zero <= 15)).all()):
        raise SchemeError(
            f"preset {preset.name} cannot express the weights of {name}: a zero point is outside 0 to 15; quantize with"
            " scheme.weights.symmetric=true"
        )
    return _arranged(quantizer, grouped, quantizer.scale, zero, torch.uint8, packed_bits=4)


def _arranged(
    quantizer: WeightQuantizer,
    grouped: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    dtype: torch.dtype,
    packed_bits: int | None = None,
) -> WeightGrid:
    """Codes `[C, G, K]` in the order and shape that DequantizeLinear can follow with one axis."""
    layout = quantizer.layout
    zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
    rows, groups = scale.shape[0], scale.shape[1]
    as_matrix = layout.transposed_groups > 1 or groups > 1
    flat = grouped.reshape(layout.channels, -1).to(dtype)
    codes = (flat if as_matrix else layout.weight(flat)).contiguous()
    block, axis = None, 0
    shape: tuple[int, ...] = (rows,)
    if groups > 1:
        block, axis, shape = grouped.shape[-1], 1, (rows, groups)
    elif rows == 1 and layout.channels > 1:
        return WeightGrid(codes, scale.reshape(()), zero_point.reshape(()).to(dtype), None, None, packed_bits)
    elif layout.transposed_groups == 1:
        axis = 1
    return WeightGrid(codes, scale.reshape(shape), zero_point.reshape(shape).to(dtype), axis, block, packed_bits)
