"""What every quantization method promises, whoever adds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.conftest import State, state_of
from tests.nn.networks import float_model as float_model_of
from tests.nn.test_placement import Tokens
from tests.small_networks import small_float_model, small_images

from synthquant.core.errors import DataError
from synthquant.core.method_settings import build_method
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.methods import QUANTIZERS, QuantStep
from synthquant.models.float_model import FloatModel
from synthquant.nn.quant_model import QuantModel

# The least work that still is the method; 10 images are not a multiple of the batch of 4.
SMALL = {"iterations": 3, "batch_size": 4, "activation_iterations": 3}
IMAGES = 10


# Methods that need layer norms or attention, with a network that has them.
TRANSFORMERS = ("repq_vit",)

# Two bits, where codes leave their grid first.
SCHEME = "W2A4"


def build(name: str) -> QuantStep:
    fields: dict[str, Any] = QUANTIZERS.get(name).model_fields  # type: ignore[attr-defined]
    return build_method(QUANTIZERS, name, {key: value for key, value in SMALL.items() if key in fields}, name)


def float_tokens() -> FloatModel:
    return float_model_of(Tokens())


def quantized(method: QuantStep, model: FloatModel, images: ImageSet, **options: Any) -> tuple[QuantModel, QuantReport]:
    quant_model = QuantModel.build(model, SCHEME)
    return quant_model, method.apply(quant_model, images, Rng(3), **options)


@dataclass(frozen=True)
class Applied:
    """A method, the network it quantized, and what there was before and after."""

    name: str
    method: QuantStep
    float_model: FloatModel
    model: QuantModel
    report: QuantReport
    float_states: tuple[State, State]
    images: tuple[str, str]
    random: tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module", params=QUANTIZERS.names())
def applied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Applied:
    """The method has run once; tests look at it from all sides and leave it as it is."""
    method, images = build(request.param), small_images(IMAGES)
    transformer = request.param in TRANSFORMERS
    float_model = float_tokens() if transformer else small_float_model(tmp_path_factory.mktemp(request.param))
    state, pixels, random = state_of(float_model), images.fingerprint, torch.random.get_rng_state()
    model, report = quantized(method, float_model, images)
    return Applied(
        request.param, method, float_model, model, report,
        float_states=(state, state_of(float_model)),
        images=(pixels, images.fingerprint),
        random=(random, torch.random.get_rng_state()),
    )  # fmt: skip


def test_leaves_the_float_network_as_it_was(applied: Applied) -> None:
    before, after = applied.float_states
    assert after == before


def test_leaves_the_images_and_the_global_random_state_alone(applied: Applied) -> None:
    before, after = applied.images
    assert after == before
    assert torch.equal(*applied.random)


def test_the_network_is_calibrated_and_finite(applied: Applied) -> None:
    assert applied.model.calibrated
    with torch.no_grad():
        assert torch.isfinite(applied.model(applied.float_model.example_images(3))).all()


def test_codes_stay_inside_their_bits(applied: Applied) -> None:
    for layer in applied.model.layers.values():
        quantizer = layer.weight_quantizer
        assert quantizer is not None and int(quantizer.codes.max()) < 2**quantizer.num_bits
        assert bool((quantizer.scale > 0).all())


def test_the_report_names_the_method_and_covers_every_layer(applied: Applied) -> None:
    report = applied.report
    assert report.method == applied.name
    if report.units:
        # a method of two phases goes through the units twice
        assert {layer for unit in report.units for layer in unit.layers} == set(applied.model.layers)
    assert QuantReport.model_validate_json(report.model_dump_json()) == report


def test_the_same_seed_gives_the_same_network_which_a_working_folder_keeps(applied: Applied, tmp_path: Path) -> None:
    wanted = applied.model.state()
    first, report = quantized(applied.method, applied.float_model, small_images(IMAGES), workdir=tmp_path / "work")
    again, report_again = quantized(
        applied.method, applied.float_model, small_images(IMAGES), workdir=tmp_path / "work"
    )
    for other in (first, again):
        assert other.state().keys() == wanted.keys()
        assert all(torch.equal(value, other.state()[key]) for key, value in wanted.items())
    assert report_again == report


def test_refuses_an_empty_set(applied: Applied) -> None:
    with pytest.raises(DataError, match="0 images"):
        applied.method.apply(QuantModel.build(applied.float_model, SCHEME), small_images(4).subset([]), Rng(0))
