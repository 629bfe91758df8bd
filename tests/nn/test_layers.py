"""Layers that are quantized where they stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.layers import QuantBlock, QuantLayer, quantize_block, quantize_layer, weight_layout
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.weight_quantizers import WeightQuantizer
from synthquant.nn.weight_sources import WeightSource


class PaddedConv(nn.Conv2d):
    """A convolution with a forward of its own, as timm's `Conv2dSame`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def coarse(scale: float = 0.5) -> AffineQuantizer:
    quantizer = AffineQuantizer(QuantArgs(num_bits=4))
    quantizer.set_grid(torch.tensor([scale]), torch.tensor([8.0]))
    return quantizer


def quantized(layer: nn.Module, inputs: ActivationQuantizer | None = None) -> QuantLayer:
    weights = WeightQuantizer(weight_layout(layer), QuantArgs(num_bits=4, strategy="channel"))
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    weights.calibrate(weight.detach(), "minmax")
    return quantize_layer(layer.requires_grad_(False), weights, inputs)


def images() -> torch.Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_a_layer_keeps_its_class_s_forward_and_its_attributes() -> None:
    layer = PaddedConv(3, 4, 3)
    again = quantized(layer, coarse())
    assert again is layer and isinstance(layer, PaddedConv) and isinstance(layer, QuantLayer)
    assert layer.in_channels == 3 and "QuantPaddedConv" in repr(layer)
    assert layer.weight_quantizer is not None and layer.input_quantizer is not None
    x = layer.input_quantizer(images())
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    assert torch.equal(layer(images()), nn.functional.conv2d(padded, layer.weight_quantizer(), layer.bias))
    assert torch.equal(layer(x=images()), layer(images()))  # by keyword


class Zeros(WeightSource):
    def compute(self) -> torch.Tensor:
        return torch.zeros(4, 5)

    def decided(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(4, 1, 5), torch.ones(4, 1, 1)


def test_which_weight_is_used() -> None:
    layer = quantized(nn.Linear(5, 4))
    assert layer.weight_quantizer is not None
    assert torch.equal(layer.weight, layer.weight_quantizer())
    layer.weights_enabled = False
    assert layer.weight is layer.float_weight
    layer.weight_source = Zeros()
    assert layer.weight is layer.float_weight, "in floating point whatever is learned"
    layer.weights_enabled = True
    assert not layer.weight.any()
    layer.harden_weight()
    assert layer.weight_source is None and not layer.weight_quantizer.codes.any()
    assert torch.equal(layer.weight, layer.weight_quantizer())
    layer.drop_float_weight()
    assert "weight" not in layer.state_dict()
    assert torch.equal(layer.weight, layer.weight_quantizer())
    with pytest.raises(ModelError, match="loaded from a checkpoint"):
        _ = layer.float_weight


def test_two_layers_of_one_class_share_the_derived_class() -> None:
    assert type(quantized(nn.Linear(2, 2))) is type(quantized(nn.Linear(3, 3)))


def test_transposed_convolution_takes_an_output_size() -> None:
    layer = quantized(nn.ConvTranspose2d(3, 4, 3, stride=2), coarse())
    assert layer(images(), output_size=[12, 12]).shape == (2, 4, 12, 12)


class Block(nn.Module):
    def forward(self, x: torch.Tensor, *, gain: float = 1.0, **others: Any) -> torch.Tensor:
        return x * gain


def test_a_block_quantizes_its_first_tensor_however_it_is_called() -> None:
    block = quantize_block(Block(), coarse())
    assert isinstance(block, Block) and isinstance(block, QuantBlock)
    expected = coarse()(images()) * 2
    assert torch.equal(block(images(), gain=2.0), expected)
    assert torch.equal(block(x=images(), gain=2.0), expected)
    assert torch.equal(block(gain=2.0, x=images(), mask=torch.ones(2)), expected)


def test_a_computed_weight_is_refused() -> None:
    normed = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    with pytest.raises(UnsupportedModelError, match="computes its weight from other parameters"):
        weight_layout(normed)
