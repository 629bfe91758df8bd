"""Genie-M's own: weight step sizes are learned, activation ranges are set anew at each unit."""

from __future__ import annotations

from typing import Any

import torch
from tests.nn.networks import Network, float_model

from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.genie_m import GenieM
from synthquant.quantize.qdrop import QDrop


def images() -> ImageSet:
    pixels = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageSet.from_tensors(pixels, dtype="float16")


def quantize(method: type[GenieM] | type[QDrop], **changes: Any) -> QuantModel:
    model = QuantModel.build(float_model(Network()), "W2A4")
    fields = {"iterations": 16, "batch_size": 8, "calibration_images": 16, **changes}
    method(**fields).apply(model, images(), Rng(0))
    return model


def weight_scales(model: QuantModel) -> list[torch.Tensor]:
    return [layer.weight_quantizer.scale for layer in model.layers.values() if layer.weight_quantizer is not None]


def test_weight_scales_are_learned_unless_their_rate_is_zero() -> None:
    start = weight_scales(quantize(GenieM, iterations=0))
    fixed = weight_scales(quantize(GenieM, weight_scale_lr=0.0))
    learned = weight_scales(quantize(GenieM))
    assert all(torch.equal(a, b) for a, b in zip(start, fixed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(start, learned, strict=True))
    qdrop = weight_scales(quantize(QDrop, observer="genie"))
    assert all(torch.equal(a, b) for a, b in zip(start, qdrop, strict=True)), "QDrop leaves them alone"


def test_a_step_is_a_share_of_the_scale_and_smaller_on_finer_grids() -> None:
    start, once = quantize(GenieM, iterations=0), quantize(GenieM, iterations=1, rounding_lr=1e-9)
    found = set()
    for before, after in zip(start.layers.values(), once.layers.values(), strict=True):
        assert before.weight_quantizer is not None and after.weight_quantizer is not None
        change = (after.weight_quantizer.scale / before.weight_quantizer.scale - 1).abs().max()
        if change > 0:  # a unit that got worse was put back
            bits = before.weight_quantizer.num_bits
            found.add(bits)
            assert torch.isclose(change, torch.tensor(3e-3 * min(1, 15 / (2**bits - 1))), rtol=1e-2)
    assert found == {2, 8}


def test_ranges_come_from_the_network_quantized_so_far() -> None:
    model = quantize(GenieM, iterations=0)
    plain = QuantModel.build(model.float_model, model.scheme)
    calibration = CalibrationSet(plain, images())
    calibrate_weights(plain, "genie")
    calibrate_activations(plain, calibration, 16, "genie", quantized_weights=False)
    first = "stem.input_quantizer"
    assert torch.equal(model.quantizers[first].scale, plain.quantizers[first].scale)
    others = [name for name in model.quantizers if name != first]
    assert any(not torch.equal(model.quantizers[name].scale, plain.quantizers[name].scale) for name in others)


def test_qdrop_may_set_ranges_anew_at_each_unit_too() -> None:
    anew = quantize(QDrop, iterations=0, observer="genie", calibrate_units=True).quantizers
    genie = quantize(GenieM, iterations=0).quantizers
    beforehand = quantize(QDrop, iterations=0, observer="genie").quantizers
    assert all(torch.equal(anew[name].scale, genie[name].scale) for name in genie)
    assert any(not torch.equal(anew[name].scale, beforehand[name].scale) for name in beforehand)


def test_annealing_decides_the_roundings() -> None:
    undecided = []
    for weight in (0.0, 30.0):
        model = QuantModel.build(float_model(Network()), "W2A4")
        method = GenieM(iterations=80, batch_size=8, rounding_lr=0.2, rounding_weight=weight, granularity="network")
        (unit,) = method.apply(model, images(), Rng(0)).units
        assert unit.undecided is not None
        undecided.append(unit.undecided)
    assert undecided[1] < 0.1 < 0.3 < undecided[0]
