"""Size and bit operations against sums by hand."""

from __future__ import annotations

from pathlib import Path

from tests.small_networks import calibrated_model, small_float_model

from synthquant.evaluate.cost import float_cost, quantized_cost

# name: weights, output channels, outputs per channel and image (inputs per channel for the transposed convolution)
LAYERS = {
    "stem": (8 * 3 * 9, 8, 8 * 8),
    "blocks.0.conv1": (8 * 8 * 9, 8, 8 * 8),
    "blocks.0.conv2": (8 * 4 * 9, 8, 8 * 8),
    "blocks.1.conv1": (12 * 8 * 9, 12, 8 * 8),
    "blocks.1.conv2": (12 * 6 * 9, 12, 8 * 8),
    "blocks.1.down": (12 * 8, 12, 8 * 8),
    "up": (12 * 3 * 4, 6, 8 * 8),
    "fc": (6 * 7, 7, 1),
}


def test_bit_operations(tmp_path: Path) -> None:
    model = calibrated_model(small_float_model(tmp_path), "W4A4")
    wide = {"stem", "fc"}  # the ends are 8 bit, and so is what the layer after the stem reads
    expected = 0
    for name, (weights, _, positions) in LAYERS.items():
        weight_bits = 8 if name in wide else 4
        input_bits = 8 if name in wide | {"blocks.0.conv1"} else 4
        expected += weights * positions * weight_bits * input_bits
    assert quantized_cost(model).bit_operations == expected
    macs = sum(weights * positions for weights, _, positions in LAYERS.values())
    assert float_cost(model).bit_operations == macs * 32 * 32


def test_size_counts_codes_scales_zero_points_and_biases(tmp_path: Path) -> None:
    model = calibrated_model(small_float_model(tmp_path), {"preset": "W3A4", "ends": "same"})
    codes = sum(-(-weights * 3 // 8) for weights, _, _ in LAYERS.values())
    grids = sum(channels * 4 for _, channels, _ in LAYERS.values()) + 5 * len(model.quantizers)
    zero_points = sum(channels for _, channels, _ in LAYERS.values())
    biases = sum(channels * 4 for _, channels, _ in LAYERS.values())
    after = 6 * 4 * 4 + 8  # the batch norm behind the ReLU is not folded: four vectors and its counter
    assert quantized_cost(model).size_bytes == codes + grids + zero_points + biases + after


def test_float_size_is_that_of_its_state(tmp_path: Path) -> None:
    model = calibrated_model(small_float_model(tmp_path))
    state = model.float_model.module.state_dict()
    assert float_cost(model).size_bytes == sum(value.nbytes for value in state.values())


def test_layers_left_in_float_cost_their_float_bits(tmp_path: Path) -> None:
    float_model = small_float_model(tmp_path)
    all_layers = quantized_cost(calibrated_model(float_model, "W4A4"))
    without = quantized_cost(calibrated_model(float_model, {"preset": "W4A4", "ignore": ["blocks.1.down"]}))
    weights, channels, positions = LAYERS["blocks.1.down"]
    assert without.bit_operations == all_layers.bit_operations + weights * positions * (32 * 32 - 4 * 4)
    assert without.size_bytes == all_layers.size_bytes + weights * 4 - weights // 2 - channels * 5
