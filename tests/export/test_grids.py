"""Grids in the forms of files: exact, or refused with the name of what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from synthquant.core.errors import SchemeError
from synthquant.export.deploy import Arithmetic
from synthquant.export.grids import WeightGrid, activation_grid, exact_bias_scale, weight_grid
from synthquant.export.presets import PRESETS
from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.weight_quantizers import WeightLayout, WeightQuantizer

SIMULATE, CPU, TENSORRT = PRESETS["simulate"], PRESETS["ort-cpu"], PRESETS["tensorrt"]
CONV, LINEAR, UP, UP_GROUPED = (
    WeightLayout((6, 4, 3, 3)),
    WeightLayout((6, 8)),
    WeightLayout((4, 6, 2, 2), 1),
    WeightLayout((4, 3, 2, 2), 2),
)


def weights(layout: WeightLayout, shift: float = 0.0, **args: Any) -> WeightQuantizer:
    quantizer = WeightQuantizer(layout, QuantArgs(**({"num_bits": 4, "strategy": "channel"} | args)))
    quantizer.calibrate(torch.randn(layout.shape, generator=torch.Generator().manual_seed(0)) + shift, "minmax")
    return quantizer


def activation(bits: int, scale: float, zero_point: int, symmetric: bool = False) -> AffineQuantizer:
    quantizer = AffineQuantizer(QuantArgs(num_bits=bits, symmetric=symmetric))
    quantizer.set_grid(torch.tensor([scale]), torch.tensor([float(zero_point)]))
    return quantizer


def decoded(quantizer: WeightQuantizer, grid: WeightGrid) -> torch.Tensor:
    values = Arithmetic().dequantize(grid.codes, grid, "layer")
    return values if values.shape == quantizer.layout.shape else quantizer.layout.weight(values)


@pytest.mark.parametrize("layout", [CONV, LINEAR, UP, UP_GROUPED], ids=["conv", "linear", "up", "grouped up"])
@pytest.mark.parametrize("shift", [0.0, 0.7, 9.0], ids=["centred", "off centre", "far from zero"])
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"num_bits": 8},
        {"num_bits": 2, "symmetric": True},
        {"strategy": "tensor"},
        {"strategy": "group", "group_size": 4},
        {"num_bits": 8, "strategy": "group", "group_size": 4},
    ],
    ids=str,
)
def test_simulate_holds_every_weight_exactly(layout: WeightLayout, shift: float, args: dict[str, Any]) -> None:
    quantizer = weights(layout, shift, **args)
    grid = weight_grid(quantizer, "layer", SIMULATE)
    # a shifted code times its scale is the same product
    assert torch.equal(decoded(quantizer, grid), quantizer())
    assert grid.codes.dtype in (torch.int8, torch.uint8, torch.int16, torch.int32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_kernels_get_int8_with_zero_point_0(bits: int) -> None:
    quantizer = weights(CONV, num_bits=bits, symmetric=True)
    grid = weight_grid(quantizer, "layer", CPU)
    assert grid.codes.dtype == torch.int8 and not grid.zero_point.any() and grid.axis == 0
    assert torch.allclose(decoded(quantizer, grid), quantizer(), rtol=1e-6, atol=0)


def test_codes_of_few_bits_are_spread_for_finer_sums_but_stay_in_7_bits() -> None:
    plain = weight_grid(weights(CONV, num_bits=4, symmetric=True), "layer", TENSORRT)
    spread = weight_grid(weights(CONV, num_bits=4, symmetric=True), "layer", CPU)
    assert torch.equal(spread.codes.int(), plain.codes.int() * 8) and torch.equal(spread.scale, plain.scale / 8)
    assert int(spread.codes.int().abs().max()) <= 64


def test_a_transposed_matrix_keeps_its_values() -> None:
    for args in ({}, {"strategy": "tensor"}, {"strategy": "group", "group_size": 4}):
        quantizer = weights(LINEAR, **args)
        grid = weight_grid(quantizer, "layer", SIMULATE).transposed()
        assert torch.equal(Arithmetic().dequantize(grid.codes, grid, "layer").t(), quantizer())


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights_fit_4_bit_types(symmetric: bool) -> None:
    quantizer = weights(LINEAR, strategy="group", group_size=4, symmetric=symmetric)
    quantizer.zero_point.clamp_(0, 15)
    grid = weight_grid(quantizer, "layer", PRESETS["ort-cpu-w4"], packed=True)
    low, high = int(grid.codes.min()), int(grid.codes.max())
    assert (low >= -8 and high <= 7) if grid.codes.dtype == torch.int8 else (low >= 0 and high <= 15)
    assert grid.packed_bits == 4 and torch.equal(decoded(quantizer, grid), quantizer())


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(
        SchemeError, match=r"ort-cpu cannot express the weights of fc: .*8-bit asymmetric.*symmetric=true"
    ):
        weight_grid(weights(CONV, 0.7, num_bits=8), "fc", CPU)
    with pytest.raises(SchemeError, match=r"the weights of fc: .*one scale for each output channel, not groups"):
        weight_grid(weights(LINEAR, strategy="group", group_size=4), "fc", CPU)
    with pytest.raises(SchemeError, match=r"the weights of fc: a zero point is outside 0 to 15"):
        weight_grid(weights(LINEAR, 9.0), "fc", PRESETS["ort-cpu-w4"], packed=True)


@pytest.mark.parametrize(("bits", "zero"), [(8, 0), (8, 117), (4, 0), (4, 7), (7, 64), (2, 1), (16, 32768)])
def test_activations_round_as_fake_quantization_does(bits: int, zero: int) -> None:
    quantizer = activation(bits, 0.0371, zero)
    grid = activation_grid(quantizer, "here", SIMULATE)
    x = torch.linspace(-4, 4, 4001) if bits < 16 else torch.linspace(-2000, 2000, 4001)
    operators = Arithmetic()
    limited = operators.clip(x, grid.low, grid.high) if grid.high is not None else x
    codes = operators.quantize(limited, grid.scale, grid.zero_point)
    assert torch.equal(operators.dequantize(codes, grid, ""), quantizer(x))


def test_int8_activations_have_zero_point_0() -> None:
    x = torch.linspace(-9, 9, 2001)
    for quantizer in (activation(8, 0.05, 128), activation(4, 0.3, 8), activation(7, 0.05, 0)):
        grid = activation_grid(quantizer, "here", TENSORRT)
        assert grid.zero_point.dtype == torch.int8 and int(grid.zero_point) == 0
        operators = Arithmetic()
        limited = x if grid.low is None and grid.high is None else operators.clip(x, grid.low, grid.high)
        codes = operators.quantize(limited, grid.scale, grid.zero_point)
        assert torch.equal(operators.dequantize(codes, grid, ""), quantizer(x))


def test_activations_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(SchemeError, match=r"tensorrt cannot express stem.input_quantizer: its grid runs from 0 to 255"):
        activation_grid(activation(8, 0.1, 0), "stem.input_quantizer", TENSORRT)
    with pytest.raises(
        SchemeError, match=r"ort-cpu cannot express stem.input_quantizer: 16-bit activations run in float"
    ):
        activation_grid(activation(16, 0.1, 0), "stem.input_quantizer", CPU)


def test_an_exact_bias_scale_loses_no_digit() -> None:
    bias = torch.tensor([0.1, -3.7e4, 1e-7, 0.0, 1.0, -(2.0**-20)])
    scale = exact_bias_scale(bias)
    codes = torch.round(bias.double() / scale)
    assert int(codes.abs().max()) <= 2**24
    assert torch.equal((codes * scale).float(), bias)
