"""The method `rotation`: rounding to nearest in rotated channels, without calibration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.nn.toy_denoiser import denoiser
from tests.small_networks import small_float_model, small_images
from torch import nn

from synthquant.core.errors import ModelError, SchemeError
from synthquant.core.rng import Rng
from synthquant.export import Onnx, TorchProgram
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.signature import Inputs
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.bias_correction import correct_biases
from synthquant.quantize.calibrate import calibrate_weights
from synthquant.quantize.equalize import equalized
from synthquant.quantize.rotation import Rotation


def rotated(model: FloatModel, scheme: object = "W8A8", **settings: int) -> QuantModel:
    quant_model = QuantModel.build(model, QuantScheme.parse(scheme))  # type: ignore[arg-type]
    report = Rotation(**settings).apply(quant_model, None, Rng(0))  # type: ignore[arg-type]
    assert report.method == "rotation"
    return quant_model


@torch.no_grad()
def error(model: QuantModel) -> float:
    example = model.float_model.example(3)
    wanted = example.call(model.float_model.module)[0]
    return float((example.call(model)[0] - wanted).norm() / wanted.norm())


def test_more_bits_are_closer_to_float() -> None:
    errors = [error(rotated(denoiser(), {"preset": scheme, "ends": "same"})) for scheme in ("W4A4", "W6A6", "W8A8")]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.05


def lone(spike: float) -> FloatModel:
    """A linear layer, one of whose 64 input channels is so many times as large as the others."""
    generator = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(64, 16), torch.randn(3, 10, 64, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(16, 64, generator=generator))
        layer.weight[:, 5] /= spike
        x[..., 5] *= spike
    network = nn.Sequential(layer).eval().requires_grad_(False)
    return FloatModel(network, Inputs((x,)), "lone", ModelSource(source="test"), "other")


def test_an_outlier_channel_is_spread_over_its_block() -> None:
    scheme = {"preset": "W8A4", "ends": "same"}
    ways = {"kind": "dynamic", "symmetric": True, "strategy": "token"}
    for spike, gain in ((1.0, 0.7), (50.0, 2.0)):
        model = lone(spike)
        plain = QuantModel.build(
            model, QuantScheme.parse({**scheme, "overrides": {"*": {"input_activations": {**ways, "num_bits": 4}}}})
        )
        calibrate_weights(plain, "minmax")
        turned = rotated(model, {**scheme, "overrides": {"*": {"input_activations": {"num_bits": 4}}}})
        x = model.takes.args[0]  # type: ignore[union-attr]
        with torch.no_grad():
            wanted = model.module(x)
            errors = [float((network(x) - wanted).norm()) for network in (plain, turned)]
        assert errors[0] > gain * errors[1]
    assert rotated(lone(50.0), scheme, block=4).layers["0"].block == 4  # type: ignore[attr-defined]


def test_images_are_not_read_but_an_empty_set_is_refused(tmp_path: Path) -> None:
    model = small_float_model(tmp_path)
    one, other = QuantModel.build(model, "W8A8"), QuantModel.build(model, "W8A8")
    Rotation().apply(one, small_images(3), Rng(0))
    Rotation().apply(other, None, Rng(1))
    assert all(torch.equal(value, other.state()[name]) for name, value in one.state().items())
    assert not Rotation.needs_images


def test_a_checkpoint_gives_the_same_outputs(tmp_path: Path) -> None:
    model = rotated(denoiser(), "W4A8", block=4)
    folder = save_checkpoint(model, tmp_path / "model")
    loaded = load_checkpoint(folder, float_model=model.float_model)
    assert loaded.scheme.rotation is not None and loaded.scheme.rotation.block == 4
    example = model.float_model.example(3)
    assert torch.equal(example.call(loaded)[0], example.call(model)[0])
    with pytest.raises(ModelError, match="loaded from a checkpoint"):
        Rotation().apply(loaded, None, Rng(0))


def test_it_is_exported_where_arithmetic_is_and_refused_by_integer_kernels(tmp_path: Path) -> None:
    model, images = rotated(small_float_model(tmp_path)), small_images(8)
    program = TorchProgram()
    found = program.verify(model, program.export(model, tmp_path / "net.pt2"), images)
    assert found["loaded"]["mean_error"] < 1e-3
    with pytest.raises(SchemeError, match=r"preset ort-cpu cannot express .*kind 'dynamic'"):
        Onnx(preset="ort-cpu").check(model)
    with pytest.raises(SchemeError, match="rotation quantizes what layers read"):
        rotated(small_float_model(tmp_path), {"preset": "W8A8", "deploy": "full"})


def test_what_scales_channels_must_come_before(tmp_path: Path) -> None:
    model = rotated(small_float_model(tmp_path))
    first = equalized(QuantModel.build(model.float_model, "W8A8"), "weights", small_images(4))
    assert first.equalization is not None
    with pytest.raises(ModelError, match="has rotated input channels cannot be equalised"):
        model.equalize(first.equalization)
    Rotation().apply(first, None, Rng(0))
    assert first.equalization is not None
    with torch.no_grad(), first.mode(weights=False, activations=False):
        x = first.float_model.example_images(3)
        torch.testing.assert_close(first(x), first.float_model.logits(x), rtol=1e-3, atol=1e-4)
    assert correct_biases(first, small_images(8)).layers > 0
