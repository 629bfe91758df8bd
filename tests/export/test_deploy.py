"""The deployed copy computes what the quantized network does, and the network stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_networks import calibrated_model, small_float_model

from synthquant.core.errors import ModelError, SchemeError
from synthquant.export.deploy import Arithmetic, DeployLinear, DeployQuantizer, deploy, packed_layers
from synthquant.export.presets import PRESETS
from synthquant.nn.quant_model import QuantModel

FULL = {"preset": "W8A8", "weights": {"symmetric": True}, "deploy": "full"}
W4_LINEAR = {
    "preset": "W8A8",
    "weights": {"symmetric": True},
    "overrides": {"fc": {"weights": {"num_bits": 4}, "input_activations": None}},
}


@pytest.mark.parametrize("scheme", ["W4A4", "W8A8", "W2A16", FULL, {**FULL, "preset": "W4A4"}, W4_LINEAR], ids=str)
def test_integer_arithmetic_gives_the_same_logits(tmp_path: Path, scheme: str | dict[str, Any]) -> None:
    model = calibrated_model(small_float_model(tmp_path), scheme)
    before = {name: value.clone() for name, value in model.state().items()}
    copied = deploy(model, PRESETS["simulate"], Arithmetic())
    x = model.float_model.example_images(4)
    with torch.no_grad():
        assert torch.allclose(copied(x), model(x), rtol=1e-5, atol=1e-5)
    assert copied.float_model is model.float_model
    assert all(isinstance(part, DeployQuantizer) for part in copied.quantizers.values())
    assert isinstance(copied.layers["fc"], DeployLinear)
    assert not any(isinstance(part, DeployQuantizer | DeployLinear) for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state().items())


def test_no_float_weight_is_left(tmp_path: Path) -> None:
    copied = deploy(calibrated_model(small_float_model(tmp_path), "W4A4"), PRESETS["simulate"], Arithmetic())
    for name, layer in copied.layers.items():
        assert layer._parameters["weight"] is None, name
        assert not layer.deploy_codes.is_floating_point(), name
    assert copied.layers["fc"].weight.shape == (7, 6)


def test_an_uncalibrated_network_is_refused(tmp_path: Path) -> None:
    model = QuantModel.build(small_float_model(tmp_path), "W8A8")
    with pytest.raises(ModelError, match="not calibrated yet"):
        deploy(model, PRESETS["simulate"], Arithmetic())


def test_packing_names_its_layers_or_says_why_not(tmp_path: Path) -> None:
    float_model, preset = small_float_model(tmp_path), PRESETS["ort-cpu-w4"]
    assert packed_layers(calibrated_model(float_model, W4_LINEAR), preset) == {"fc"}
    assert packed_layers(calibrated_model(float_model, W4_LINEAR), PRESETS["ort-cpu"]) == frozenset()
    with pytest.raises(SchemeError, match=r"the scheme has none; use preset ort-cpu"):
        packed_layers(calibrated_model(float_model, "W8A8"), preset)
    with pytest.raises(SchemeError, match=r"cannot express fc: a product of 4-bit weights with 4-bit activations"):
        packed_layers(calibrated_model(float_model, {"preset": "W4A4", "ends": "same"}), preset)
