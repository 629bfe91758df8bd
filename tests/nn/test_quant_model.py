"""Which quantizer goes where, and how the quantized copy is switched, stored and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.nn.networks import Encoder, Keywords, Network, Normed, Upsampling, float_model
from tests.nn.toy_denoiser import denoiser
from tests.small_networks import calibrated_model, small_float_model
from torch import nn

from synthquant.core.errors import ModelError, SchemeError, UnsupportedModelError
from synthquant.data.image_set import ImageSet
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights


def ready(model: QuantModel, scale: float = 0.1) -> QuantModel:
    """Any grids will do."""
    for layer in model.layers.values():
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.calibrate(layer.float_weight, "minmax")
    for quantizer in model.quantizers.values():
        quantizer.set_grid(torch.tensor([scale]), torch.tensor([float(quantizer.quant_max // 2)]))
    return model


def images(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_nothing_to_quantize_is_an_error() -> None:
    with pytest.raises(SchemeError, match="leaves all 5 layers in floating point"):
        QuantModel.build(float_model(Network()), QuantScheme.parse({"preset": "W4A4", "ignore": ["*"]}))
    with pytest.raises(SchemeError, match="no convolution or linear layer"):
        QuantModel.build(float_model(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())), "W4A4")


def test_readers_of_one_tensor_share_a_quantizer() -> None:
    model = QuantModel.build(float_model(Network()), "W4A4")
    widening = model.module.get_submodule("blocks.1")
    assert isinstance(widening.conv1, nn.Module)
    shared = model.layers["blocks.1.conv1"].input_quantizer
    assert shared is not None and shared is model.layers["blocks.1.down"].input_quantizer
    assert sum(quantizer is shared for quantizer in model.quantizers.values()) == 1
    entry = model.quantizers["blocks.0.input_quantizer"]
    assert model.layers["blocks.0.conv1"].input_quantizer is None
    assert entry is model.module.get_submodule("blocks.0.input_quantizer")
    assert model.input_bits("blocks.0.conv1") == 8 and entry.num_bits == 8  # reads what the first layer puts out
    assert model.input_bits("blocks.1.conv1") == 4
    parts = [part for part in model.module.modules() if isinstance(part, ActivationQuantizer)]
    assert {id(part) for part in parts} == {id(quantizer) for quantizer in model.quantizers.values()}


def test_the_shortcut_reads_the_quantized_tensor_or_not() -> None:
    for shortcuts in (True, False):
        model = QuantModel.build(float_model(Network()), QuantScheme.parse({"preset": "W8A8", "shortcuts": shortcuts}))
        assert ("blocks.0.input_quantizer" in model.quantizers) == shortcuts
        ready(model, scale=0.5)
        block = model.module.get_submodule("blocks.0")
        branch = model.layers["blocks.0.conv1"].weight_quantizer
        assert branch is not None
        branch.set_codes(branch.zero_point.expand(4, 1, 36))
        with torch.no_grad():
            x = 10 + torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))  # past the ReLU
            rest = block(x)  # the branch is constant now: what varies came through the shortcut
            fine = (rest[:, :, 3:5, 3:5] - rest[:, :, 3:4, 3:4]) / 0.5
        assert torch.allclose(fine, fine.round(), atol=1e-4) == shortcuts


def test_readers_with_different_schemes_do_not_share() -> None:
    overrides = {"blocks.1.down": {"input_activations": {"num_bits": 8}}, "blocks.0.conv1": {"input_activations": None}}
    model = QuantModel.build(float_model(Network()), QuantScheme.parse({"preset": "W4A4", "overrides": overrides}))
    assert model.layers["blocks.1.conv1"].input_quantizer is not model.layers["blocks.1.down"].input_quantizer
    assert model.input_bits("blocks.1.down") == 8
    assert model.input_bits("blocks.0.conv1") is None and "blocks.0.input_quantizer" not in model.quantizers


def test_ignored_layers_stay_float_and_are_listed() -> None:
    model = QuantModel.build(float_model(Network()), QuantScheme.parse({"preset": "W4A4", "ignore": ["blocks.0.*"]}))
    assert type(model.module.get_submodule("blocks.0.conv1")) is nn.Conv2d
    row = next(row for row in model.coverage() if row.name == "blocks.0.conv1")
    assert (row.reason, row.weight_bits, row.input_bits) == ("left out by the scheme", None, None)
    assert "blocks.0" not in [unit.name for unit in model.units()]
    assert model.input_bits("blocks.1.conv1") == 4, "the second layer is the second, ignored or not"


def test_macs(tmp_path: Path) -> None:
    model = QuantModel.build(float_model(Upsampling()), "W4A4")
    macs = {row.name: row.macs for row in model.coverage()}
    assert macs["stem"] == 8 * 8 * 8 * 3 * 9
    assert macs["up"] == 4 * 4 * 8 * 3 * 4  # each input position times [3 per group, 2, 2] weights
    small = QuantModel.build(small_float_model(tmp_path), "W4A4")
    assert {row.name: row.macs for row in small.coverage()}["fc"] == 6 * 7


def test_transposed_convolutions_are_quantized_by_output_channel() -> None:
    model = ready(QuantModel.build(float_model(Upsampling()), "W8A8"))
    quantizer = model.layers["up"].weight_quantizer
    assert quantizer is not None and quantizer.scale.shape == (6, 1, 1)
    weight, decoded = model.layers["up"].float_weight, quantizer()
    assert float((weight - decoded).abs().max()) <= float(quantizer.scale.max()) * 0.51
    with torch.no_grad(), model.mode(weights=True, activations=False):
        x = images()
        assert torch.allclose(model(x), model.float_model.module(x), rtol=0.05, atol=0.02)


@torch.no_grad()
def test_a_fused_encoder_layer_does_not_bypass_its_layers() -> None:
    model = ready(QuantModel.build(float_model(Encoder()), "W4A4"))
    called = []
    for name in ("encoder.linear1", "encoder.linear2"):
        quantizer = model.layers[name].input_quantizer
        assert quantizer is not None
        quantizer.forward = lambda x, name=name: called.append(name) or x  # type: ignore[method-assign, misc]
    model(images())
    assert called == ["encoder.linear1", "encoder.linear2"]
    x = images()
    with model.mode(weights=False, activations=False):
        assert torch.allclose(model(x), model.float_model.module(x), atol=1e-5)


@torch.no_grad()
def test_a_block_called_by_keyword() -> None:
    model = ready(QuantModel.build(float_model(Keywords()), "W8A8"))
    assert any(name.startswith("blocks.0.input") for name in model.quantizers)
    assert torch.isfinite(model(images())).all()


def test_a_computed_weight_is_a_clear_error() -> None:
    with pytest.raises(UnsupportedModelError, match="computes its weight"):
        QuantModel.build(float_model(Normed()), "W4A4")


@torch.no_grad()
def test_mode_switches_and_restores() -> None:
    model = ready(QuantModel.build(float_model(Network()), "W4A4"))
    x = images()
    before = model(x)
    outputs = {}
    for weights in (True, False):
        for activations in (True, False):
            with model.mode(weights=weights, activations=activations):
                outputs[weights, activations] = model(x)
    assert torch.equal(outputs[True, True], before)
    assert len({tuple(output.flatten().tolist()) for output in outputs.values()}) == 4
    assert torch.allclose(outputs[False, False], model.float_model.module(x), atol=1e-5)
    with pytest.raises(KeyError), model.mode(weights=False, activations=False):
        raise KeyError
    with model.mode(weights=False, activations=True), model.mode(weights=True, activations=False):
        pass
    assert torch.equal(model(x), before)


def change(name: str, value: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(state: dict[str, torch.Tensor]) -> None:
        if value is None:
            del state[name]
        else:
            state[name] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (change("stem.bias", None), "missing stem.bias"),
        (change("stem.weight", torch.zeros(1)), "unexpected stem.weight"),
        (change("fc.weight_codes", torch.zeros(1)), "wrong shape of fc.weight_codes"),
    ],
)
def test_loading_is_strict(tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], said: str) -> None:
    model = calibrated_model(small_float_model(tmp_path))
    state = {name: tensor.clone() for name, tensor in model.state().items()}
    edit(state)
    with pytest.raises(ModelError, match=said):
        model.load_state(state)


@torch.no_grad()
def test_a_loaded_network_has_no_float_weights(tmp_path: Path) -> None:
    float_ = small_float_model(tmp_path)
    model = calibrated_model(float_, {"preset": "W4A4", "ignore": ["blocks.0.conv2"]})
    loaded = QuantModel.build(float_, model.scheme)
    loaded.load_state(copy.deepcopy(model.state()))
    x = float_.example_images(3)
    assert torch.equal(loaded(x), model(x)) and loaded.calibrated
    assert "blocks.0.conv2.weight" in loaded.state() and "blocks.0.conv1.weight" not in loaded.state()
    with pytest.raises(ModelError, match="holds no float weights"), loaded.mode(weights=False, activations=True):
        pass
    with loaded.mode(weights=True, activations=False):
        assert not torch.equal(loaded(x), model(x))


def test_build_does_not_draw_random_numbers_or_change_modes(tmp_path: Path) -> None:
    float_ = small_float_model(tmp_path)
    fingerprint, state = float_.fingerprint, torch.get_rng_state()
    model = QuantModel.build(float_, "W4A4")
    assert float_.fingerprint == fingerprint and torch.equal(torch.get_rng_state(), state)
    assert not any(part.training for part in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [pair[0] for pair in model.folded] == [
        "norm",
        "blocks.0.bn1",
        "blocks.0.bn2",
        "blocks.1.bn1",
        "blocks.1.bn2",
    ]


def test_the_image_keeps_its_range_whatever_the_calibration_images_reach(tmp_path: Path) -> None:
    model = small_float_model(tmp_path)
    grey = ImageSet.from_tensors(torch.full((8, 3, *model.preprocess.input_size), 0.5))
    quant_model = QuantModel.build(model, "W8A8")
    calibrate_weights(quant_model, "minmax")
    calibrate_activations(quant_model, CalibrationSet(quant_model, grey), 8, "genie", quantized_weights=True)
    quantizer = quant_model.quantizers["stem.input_quantizer"]
    low, high = model.preprocess.limits
    step = float(quantizer.scale)
    ends = torch.tensor([low, high])
    assert quantizer.fixed and step == pytest.approx((high - low) / 255)
    assert torch.allclose(quantizer(ends), ends, atol=step), "neither black nor white is cut off"


@pytest.mark.parametrize("deploy", ["papers", "full"])
def test_a_denoiser_reads_its_noisy_image_with_8_bits(deploy: str) -> None:
    """Although it embeds the time first; 4 bits of noise are all that the sampler has."""
    model = QuantModel.build(denoiser(), {"preset": "W4A4", "deploy": deploy})
    bits = {name: (layer.weight_quantizer.num_bits, model.input_bits(name)) for name, layer in model.layers.items()
            if layer.weight_quantizer is not None}  # fmt: skip
    assert bits["time"] == bits["conv_in"] == bits["conv_out"] == (8, 8) and bits["down"] == (4, 4)
