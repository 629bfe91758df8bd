"""What every quantization method promises, whoever adds it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.conftest import State
from tests.small_networks import small_images

from synthquant.core.errors import DataError
from synthquant.core.rng import Rng
from synthquant.methods import QUANTIZERS, QuantReport, QuantStep
from synthquant.models.float_model import FloatModel
from synthquant.nn.quant_model import QuantModel
from synthquant.recipe import build_method

# The least work that still is the method; 10 images are not a multiple of the batch of 4.
SMALL = {"iterations": 3, "batch_size": 4, "activation_iterations": 3}
IMAGES = 10


@pytest.fixture(params=QUANTIZERS.names())
def name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def method(name: str) -> QuantStep:
    fields: dict[str, Any] = QUANTIZERS.get(name).model_fields  # type: ignore[attr-defined]
    return build_method(QUANTIZERS, name, {key: value for key, value in SMALL.items() if key in fields}, name)


def quantized(
    method: QuantStep, model: FloatModel, seed: int = 0, scheme: str = "W4A4", **options: Any
) -> tuple[QuantModel, QuantReport]:
    quant_model = QuantModel.build(model, scheme)
    report = method.apply(quant_model, small_images(IMAGES), Rng(seed), **options)
    return quant_model, report


def test_leaves_the_float_network_as_it_was(method: QuantStep, model: FloatModel, state: Callable[[], State]) -> None:
    before = state()
    quantized(method, model)
    assert state() == before


def test_the_network_is_calibrated_and_finite(method: QuantStep, model: FloatModel) -> None:
    quant_model, _ = quantized(method, model)
    assert quant_model.calibrated
    with torch.no_grad():
        assert torch.isfinite(quant_model(model.example_images(3))).all()


def test_codes_stay_inside_their_bits(method: QuantStep, model: FloatModel) -> None:
    quant_model, _ = quantized(method, model, scheme="W2A4")
    for layer in quant_model.layers.values():
        quantizer = layer.weight_quantizer
        assert quantizer is not None and int(quantizer.codes.max()) < 2**quantizer.num_bits
        assert bool((quantizer.scale > 0).all())


def test_the_same_seed_gives_the_same_network(method: QuantStep, model: FloatModel) -> None:
    first, second = (quantized(method, model, seed=3)[0].state() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_leaves_the_global_random_state_alone(method: QuantStep, model: FloatModel) -> None:
    before = torch.random.get_rng_state()
    quantized(method, model)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_report_names_the_method_and_covers_every_layer(name: str, method: QuantStep, model: FloatModel) -> None:
    quant_model, report = quantized(method, model)
    assert report.method == name
    if report.units:
        # a method of two phases goes through the units twice
        assert {layer for unit in report.units for layer in unit.layers} == set(quant_model.layers)
    assert QuantReport.model_validate_json(report.model_dump_json()) == report


def test_with_a_working_folder_the_result_is_the_same_and_can_be_taken_up(
    method: QuantStep, model: FloatModel, tmp_path: Path
) -> None:
    without, _ = quantized(method, model)
    first, report = quantized(method, model, workdir=tmp_path / "work")
    again, report_again = quantized(method, model, workdir=tmp_path / "work")
    for other in (first, again):
        assert all(torch.equal(value, other.state()[key]) for key, value in without.state().items())
    assert report_again == report


def test_refuses_an_empty_set(method: QuantStep, model: FloatModel) -> None:
    with pytest.raises(DataError, match="0 images"):
        method.apply(QuantModel.build(model, "W4A4"), small_images(4).subset([]), Rng(0))


def test_the_images_are_left_as_they_were(method: QuantStep, model: FloatModel) -> None:
    images = small_images(IMAGES)
    before = images.fingerprint
    method.apply(QuantModel.build(model, "W4A4"), images, Rng(0))
    assert images.fingerprint == before
