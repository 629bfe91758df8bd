"""Per-layer ratios against plain recomputations."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.small_networks import calibrated_model, small_float_model, small_images
from torch import Tensor, nn

from synthquant.core.errors import DataError, ModelError
from synthquant.core.modules import hooked
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.evaluate.agreement import SqnrRow, measure_sqnr
from synthquant.nn.quant_model import QuantModel


def decibels(reference: Tensor, actual: Tensor) -> float:
    noise = float((reference.double() - actual.double()).square().sum())
    return 10 * math.log10(float(reference.double().square().sum()) / noise)


def watch(model: QuantModel, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and outputs of all layers."""
    seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[0][name], seen[1][name] = args[0].clone(), output.clone()

        return keep

    with torch.no_grad(), hooked([(layer, hook(name)) for name, layer in model.layers.items()]):
        model(inputs)
    return seen


@pytest.fixture
def model(tmp_path: Path) -> QuantModel:
    return calibrated_model(small_float_model(tmp_path))


def test_all_ratios_match_one_layer_at_a_time(model: QuantModel) -> None:
    images = small_images(10)
    rows = {row.name: row for row in measure_sqnr(model, images, batch_size=4)}
    inputs = model_inputs(images, model.float_model.preprocess)
    with model.mode(weights=False, activations=False):
        float_inputs, float_outputs = watch(model, inputs)
    _, quantized_outputs = watch(model, inputs)
    assert list(rows) == list(model.layers)
    for name, layer in model.layers.items():
        row = rows[name]
        quantizer = model.quantizers[model.reads[name]]
        assert layer.weight_quantizer is not None
        assert row.weights == pytest.approx(decibels(layer.float_weight, layer.weight_quantizer()), abs=1e-3)
        assert row.activations == pytest.approx(decibels(float_inputs[name], quantizer(float_inputs[name])), abs=1e-3)
        with torch.no_grad():
            alone = layer(quantizer(float_inputs[name]))  # quantizing twice changes nothing
        assert row.alone == pytest.approx(decibels(float_outputs[name], alone), abs=1e-3)
        assert row.cumulative == pytest.approx(decibels(float_outputs[name], quantized_outputs[name]), abs=1e-3)


def test_cumulative_is_the_network_quantized_up_to_the_layer(model: QuantModel) -> None:
    """Switch quantization on one layer after the other; what comes later makes no difference."""
    images = small_images(6)
    inputs = model_inputs(images, model.float_model.preprocess)
    rows = {row.name: row for row in measure_sqnr(model, images)}
    with model.mode(weights=False, activations=False):
        _, float_outputs = watch(model, inputs)
        for name, layer in model.layers.items():
            layer.weights_enabled = True
            model.quantizers[model.reads[name]].enabled = True
            _, outputs = watch(model, inputs)
            assert rows[name].cumulative == pytest.approx(decibels(float_outputs[name], outputs[name]), abs=1e-3)


def test_eight_bits_are_better_than_four(tmp_path: Path) -> None:
    float_model = small_float_model(tmp_path)
    low = measure_sqnr(calibrated_model(float_model, "W4A4"), small_images())
    high = measure_sqnr(calibrated_model(float_model, "W8A8"), small_images())
    for row_low, row_high in zip(low[1:-1], high[1:-1], strict=True):
        assert row_high.cumulative is not None and row_low.cumulative is not None
        assert row_high.cumulative > row_low.cumulative + 6


def test_weight_only_schemes_have_no_activation_ratio(tmp_path: Path) -> None:
    rows = measure_sqnr(calibrated_model(small_float_model(tmp_path), "W4A16"), small_images())
    assert all(row.activations is None and row.weights is not None and row.alone is not None for row in rows)


def test_the_model_is_left_as_it_was(model: QuantModel) -> None:
    before = {name: value.clone() for name, value in model.state().items()}
    model.train()
    with model.mode(weights=False, activations=True):
        measure_sqnr(model, small_images(4))
        assert not any(layer.weights_enabled for layer in model.layers.values())
    assert all(layer.weights_enabled for layer in model.layers.values()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loaded_model_needs_the_float_one(model: QuantModel) -> None:
    expected = measure_sqnr(model, small_images(4))
    loaded = QuantModel.build(copy.copy(model.float_model), model.scheme)
    loaded.load_state(model.state())
    with pytest.raises(ModelError, match="holds no float weights; give the float model too"):
        measure_sqnr(loaded, small_images(4))
    again = measure_sqnr(loaded, small_images(4), float_model=model.float_model)
    assert again == expected


def test_no_images_is_an_error(model: QuantModel) -> None:
    with pytest.raises(DataError, match="none of the 0 images to measure with can be read"):
        measure_sqnr(model, ImageSet.from_tensors(torch.zeros(0, 3, 16, 16, dtype=torch.uint8)))


def test_rows_are_json(model: QuantModel) -> None:
    assert SqnrRow("a", 1.0, None, 2.0, 3.0).row() == {
        "name": "a",
        "weights": 1.0,
        "activations": None,
        "alone": 2.0,
        "cumulative": 3.0,
    }
