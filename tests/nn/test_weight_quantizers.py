"""Codes of every kind of weight, and the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from synthquant.core.errors import SchemeError
from synthquant.nn.functional import fake_quantize
from synthquant.nn.layers import weight_layout
from synthquant.nn.observers import OBSERVERS
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.weight_quantizers import WeightQuantizer

LAYERS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(8, 6, 3),
    "grouped": nn.Conv2d(8, 6, 3, groups=2),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    "dilated": nn.Conv2d(8, 6, (3, 1), dilation=2),
    "conv1d": nn.Conv1d(8, 6, 5),
    "conv3d": nn.Conv3d(4, 6, 2),
    "linear": nn.Linear(24, 6),
    "transposed": nn.ConvTranspose2d(8, 6, 3),
    "transposed_grouped": nn.ConvTranspose2d(8, 6, 3, groups=2),
    "transposed_depthwise": nn.ConvTranspose1d(8, 8, 3, groups=8),
    "transposed_3d": nn.ConvTranspose3d(4, 6, 2, groups=2),
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 1},
}


@pytest.fixture(autouse=True)
def random_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in LAYERS.values():
        for parameter in layer.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def quantizer_for(layer: nn.Module, **args: Any) -> WeightQuantizer:
    fields = {"num_bits": 4, "strategy": "channel", **args}
    return WeightQuantizer(weight_layout(layer), QuantArgs(**fields), "layer")


def weight_of(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


@pytest.mark.parametrize("name", LAYERS)
def test_rows_are_output_channels(name: str) -> None:
    """Scaling one row scales exactly that output channel."""
    layer = LAYERS[name]
    layout = weight_layout(layer)
    rows = layout.rows(weight_of(layer))
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert rows.shape == (channels, weight_of(layer).numel() // channels) and layout.channels == channels
    assert torch.equal(layout.weight(rows), weight_of(layer))
    spatial = {"Conv1d": 1, "ConvTranspose1d": 1, "Conv3d": 3, "ConvTranspose3d": 3, "Linear": 0}
    dims = spatial.get(type(layer).__name__, 2)
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    x = torch.randn(2, inputs, *[9] * dims, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer.bias.zero_()  # type: ignore[operator, union-attr]
        before = layer(x)
        rows = rows.clone()
        rows[3] *= 3
        layer.weight.copy_(layout.weight(rows))  # type: ignore[operator, union-attr]
        after = layer(x)
    before[:, 3] *= 3
    assert torch.allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layout_round_trip_and_decoding(name: str, strategy: str) -> None:
    layer = LAYERS[name]
    weight = weight_of(layer)
    quantizer = quantizer_for(layer, **STRATEGIES[strategy])
    assert torch.equal(quantizer.ungrouped(quantizer.grouped(weight)), weight)
    quantizer.calibrate(weight, "genie")
    rows = 1 if strategy == "tensor" else quantizer.layout.channels
    groups = weight.numel() // rows if strategy == "group" else 1
    assert quantizer.scale.shape == quantizer.zero_point.shape == (rows, groups, 1)
    assert quantizer.codes.shape == weight.shape and quantizer.codes.dtype == torch.uint8
    assert int(quantizer.codes.max()) <= 15
    expected = fake_quantize(quantizer.grouped(weight), quantizer.scale, quantizer.zero_point, 15)
    assert torch.equal(quantizer(), quantizer.ungrouped(expected))


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_covers_the_range(bits: int) -> None:
    weight = weight_of(LAYERS["conv"])
    quantizer = quantizer_for(LAYERS["conv"], num_bits=bits)
    quantizer.calibrate(weight, "minmax")
    assert int(quantizer.codes.min()) == 0 and int(quantizer.codes.max()) == 2**bits - 1
    error = (quantizer() - weight).abs().flatten(1).amax(1)
    assert bool((error <= quantizer.scale.flatten() * 0.501).all())


@pytest.mark.parametrize("observer", OBSERVERS.names())
def test_symmetric_weights_have_zero_in_the_middle(observer: str) -> None:
    layer = LAYERS["conv"]
    weight = weight_of(layer).clone()
    weight[2].abs_()
    weight[4] = 0
    quantizer = quantizer_for(layer, symmetric=True)
    quantizer.calibrate(weight, observer)
    assert set(quantizer.zero_point.flatten().tolist()) == {8.0}
    decoded = quantizer()
    assert torch.equal(decoded[4], torch.zeros_like(decoded[4]))
    largest = weight.abs().flatten(1).amax(1)
    assert bool(((decoded - weight).abs().flatten(1).amax(1) <= largest * 0.6 + 1e-6).all())


def test_the_scheme_s_observer_wins() -> None:
    layer = LAYERS["conv"]
    plain, fixed = quantizer_for(layer, num_bits=2), quantizer_for(layer, num_bits=2, observer="minmax")
    for quantizer in (plain, fixed):
        quantizer.calibrate(weight_of(layer), "genie")
    assert bool((fixed.scale >= plain.scale).all()) and not torch.equal(fixed.scale, plain.scale)


@pytest.mark.parametrize("observer", OBSERVERS.names())
def test_constant_channels_are_kept(observer: str) -> None:
    """Also the rule where every output channel has one weight only."""
    layer = nn.Conv2d(5, 5, 1, groups=5)
    weight = torch.tensor([0.0, 0.7, -0.02, 300.0, 1e-5]).view(5, 1, 1, 1)
    quantizer = quantizer_for(layer)
    quantizer.calibrate(weight, observer)
    assert torch.allclose(quantizer(), weight, rtol=1e-6, atol=1e-8)


def test_group_size_must_divide() -> None:
    with pytest.raises(SchemeError, match="layer: group_size 7 does not divide the 72 weights of an output channel"):
        quantizer_for(LAYERS["conv"], strategy="group", group_size=7)
    assert quantizer_for(LAYERS["conv"], strategy="group", group_size=36).scale.shape == (6, 2, 1)


def test_set_codes_takes_scales_too() -> None:
    quantizer = quantizer_for(LAYERS["transposed_grouped"])
    quantizer.calibrate(weight_of(LAYERS["transposed_grouped"]), "minmax")
    before, scale = quantizer(), quantizer.scale * 2
    codes = quantizer.grouped(quantizer.codes)
    quantizer.set_codes(codes, scale)
    assert torch.allclose(quantizer(), before * 2)
    assert "4 bits, channel" in repr(quantizer)
