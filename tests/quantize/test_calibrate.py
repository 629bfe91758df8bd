"""Ranges of weights and activations before anything is learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.nn.networks import Network, float_model

from synthquant.core.errors import DataError
from synthquant.data.image_set import ImageSet
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights


def pixels(count: int = 20) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> QuantModel:
    model = QuantModel.build(float_model(Network()), "W4A4")
    calibrate_weights(model, "minmax")
    return model


def scales(model: QuantModel) -> list[float]:
    return [float(quantizer.scale) for quantizer in model.quantizers.values()]


def test_images_come_normalised_and_limited() -> None:
    images = CalibrationSet(network(), ImageSet.from_tensors(pixels(), dtype="float16"))
    assert len(images) == 20
    assert [len(batch) for batch in images.batches(limit=10, size=4)] == [4, 4, 2]
    (batch,) = next(images.batches(limit=20)).tensors
    assert torch.allclose(batch, (pixels() - 0.5) / 0.25, atol=1e-2)
    assert sum(len(batch) for batch in images.batches(limit=1000)) == 20


def test_images_end_at_black_and_white() -> None:
    images = CalibrationSet(network(), ImageSet.from_tensors(pixels() * 3 - 1, dtype="float16"))
    (batch,) = next(images.batches()).tensors
    assert torch.allclose(batch, ((pixels() * 3 - 1).clamp(0, 1) - 0.5) / 0.25, atol=1e-2)


def test_no_images() -> None:
    with pytest.raises(DataError, match="0 images to quantize with"):
        CalibrationSet(network(), ImageSet.from_tensors(pixels(0)))


def test_unreadable_images_only(tmp_path: Path) -> None:
    from synthquant.data.sources import open_images

    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"not an image")
    images = CalibrationSet(network(), open_images(tmp_path))
    with pytest.raises(DataError, match="none of the 3 images to quantize with can be read"):
        list(images.batches())


@torch.no_grad()
def test_activation_ranges_are_those_of_the_network_asked_for() -> None:
    model = network()
    images = CalibrationSet(model, ImageSet.from_tensors(pixels(), dtype="float16"))
    seen: dict[bool, list[float]] = {}
    inputs: list[torch.Tensor] = []
    model.layers["fc"].register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    for quantized in (False, True):
        calibrate_activations(model, images, 20, "minmax", quantized_weights=quantized)
        inputs.clear()
        with model.mode(weights=quantized, activations=False):
            for batch in images.batches():
                batch.call(model)
        values = torch.cat(inputs)
        quantizer = model.layers["fc"].input_quantizer
        assert quantizer is not None and quantizer.calibrated and quantizer.watcher is None
        span = float(values.max().clamp(min=0) - values.min().clamp(max=0))
        assert float(quantizer.scale) == pytest.approx(span / quantizer.quant_max, rel=1e-5)
        seen[quantized] = [float(model.quantizers["stem.input_quantizer"].scale), float(quantizer.scale)]
    assert seen[True][1] != seen[False][1]
    assert seen[True][0] == seen[False][0], "the image is the same"


def test_ranges_do_not_depend_on_the_batches_and_fewer_images_may_be_looked_at() -> None:
    model = network()
    images = ImageSet.from_tensors(pixels(), dtype="float16")
    calibrate_activations(model, CalibrationSet(model, images), 20, "genie", quantized_weights=True)
    whole = scales(model)

    class Singly(CalibrationSet):
        def batches(self, limit: int | None = None, size: int = 64):  # type: ignore[no-untyped-def]
            return super().batches(limit, 3)

    calibrate_activations(model, Singly(model, images), 20, "genie", quantized_weights=True)
    assert scales(model) == pytest.approx(whole, rel=1e-3)
    calibrate_activations(model, CalibrationSet(model, images), 2, "genie", quantized_weights=True)
    assert scales(model) != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("quantized", [False, True])
def test_ranges_are_set_anew_as_if_there_were_none(quantized: bool) -> None:
    """Grids that are there, and that of the image, which always is, quantize nothing meanwhile; that one stays."""
    model = network()
    image = model.quantizers["stem.input_quantizer"]
    known = float(image.scale), float(image.zero_point)
    images = CalibrationSet(model, ImageSet.from_tensors(pixels() * 0.5, dtype="float16"))
    calibrate_activations(model, images, 20, "minmax", quantized_weights=quantized)
    first = scales(model)
    calibrate_activations(model, images, 20, "minmax", quantized_weights=quantized)
    assert scales(model) == first
    assert image.fixed and (float(image.scale), float(image.zero_point)) == known


def test_an_unfinished_calibration_leaves_no_observer_behind() -> None:
    model = network()
    images = CalibrationSet(model, ImageSet.from_tensors(pixels(), dtype="float16"))
    model.layers["fc"].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate_activations(model, images, 20, "genie", quantized_weights=True)
    assert all(quantizer.watcher is None for quantizer in model.quantizers.values())
    assert all(layer.weights_enabled for layer in model.layers.values())


def test_images_that_are_not_finite() -> None:
    model = network()
    broken = pixels()
    broken[3, 0, 0, 0] = float("inf")
    images = CalibrationSet(model, ImageSet.from_tensors(broken, dtype="float16"))
    with pytest.raises(DataError, match="not finite"):
        calibrate_activations(model, images, 20, "genie", quantized_weights=True)
