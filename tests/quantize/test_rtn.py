"""Nearest rounding, the baseline."""

from __future__ import annotations

import torch
from tests.nn.networks import Network, float_model

from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.nn.functional import fake_quantize
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.rtn import Rtn


def quantized(scheme: str, **settings: str) -> QuantModel:
    pixels = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = QuantModel.build(float_model(Network()), scheme)
    report = Rtn(**settings).apply(model, ImageSet.from_tensors(pixels, dtype="float16"), Rng(0))  # type: ignore[arg-type]
    assert report.method == "rtn" and report.units == ()
    return model


def test_weights_are_the_nearest_of_their_grid() -> None:
    model = quantized("W3A4")
    assert model.calibrated
    for layer in model.layers.values():
        quantizer = layer.weight_quantizer
        assert quantizer is not None
        grouped = quantizer.grouped(layer.float_weight)
        nearest = fake_quantize(grouped, quantizer.scale, quantizer.zero_point, quantizer.args.quant_max)
        assert torch.equal(quantizer(), quantizer.ungrouped(nearest))


@torch.no_grad()
def test_more_bits_are_closer_to_float() -> None:
    errors = []
    for scheme in ("W2A4", "W4A4", "W8A8"):
        model = quantized(scheme)
        x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 4 - 2
        wanted = model.float_model.logits(x)
        errors.append(float((model(x) - wanted).norm() / wanted.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_the_observer_matters() -> None:
    scales = [float(quantized("W4A4", observer=name).quantizers["fc.input_quantizer"].scale) for name in
              ("minmax", "genie")]  # fmt: skip
    assert scales[0] != scales[1]
