"""Output correction: what is systematic in the error of the output is taken out of the last layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.networks import Network, float_model
from torch import nn

from synthquant import make
from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.output_correction import correct_output
from synthquant.quantize.rtn import Rtn
from synthquant.recipe import QuantizeSection


def pictures(count: int = 24) -> ImageSet:
    pixels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageSet.from_tensors(pixels, dtype="float16")


def quantized(network: nn.Module, scheme: Any = "W3A3") -> QuantModel:
    model = QuantModel.build(float_model(network), scheme)
    Rtn().apply(model, pictures(), Rng(0))
    return model


@torch.no_grad()
def outputs(model: QuantModel) -> tuple[torch.Tensor, torch.Tensor]:
    """What the float and the quantized network put out for all pictures, float64."""
    batches = list(CalibrationSet(model, pictures()).batches())
    with model.mode(weights=False, activations=False):
        wanted = torch.cat([batch.call(model) for batch in batches]).double()
    return wanted, torch.cat([batch.call(model) for batch in batches]).double()


def slopes_and_means(model: QuantModel) -> tuple[torch.Tensor, torch.Tensor]:
    wanted, made = outputs(model)
    off, own = made - made.mean(0), wanted - wanted.mean(0)
    return (off * own).sum(0) / own.square().sum(0), (made - wanted).mean(0)


def test_the_error_left_has_mean_0_and_nothing_to_do_with_the_output() -> None:
    model = quantized(Network())
    slopes, means = slopes_and_means(model)
    assert (slopes - 1).abs().max() > 0.02 and means.abs().max() > 0.01
    layer = model.layers[model.last_layer]
    codes = layer.weight_quantizer.codes.clone() if layer.weight_quantizer else None
    report = correct_output(model, pictures())
    after, left = slopes_and_means(model)
    torch.testing.assert_close(after, torch.ones_like(after), atol=1e-4, rtol=0)
    assert left.abs().max() < 1e-5
    assert (report.layer, report.samples) == (model.last_layer, 24)
    assert report.gain_low == pytest.approx(float(slopes.min())) and report.gain_high == pytest.approx(
        float(slopes.max())
    )
    assert layer.weight_quantizer is not None and codes is not None and torch.equal(layer.weight_quantizer.codes, codes)


def test_nothing_but_the_last_layer_changes() -> None:
    model, other = quantized(Network()), quantized(Network())
    correct_output(model, pictures())
    for name, tensor in model.state().items():
        own = name.startswith(f"{model.last_layer}.") and name.endswith(("bias", "weight_scale"))
        assert torch.equal(tensor, other.state()[name]) is not own, name
    assert torch.equal(outputs(model)[0], outputs(other)[0]), "the float network is what it was"


def test_a_median_over_steps_of_a_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of three steps, in which the output is off by far more, does not count."""
    plain, stepped = quantized(Network(), "W8A8"), quantized(Network(), "W8A8")
    layer = stepped.layers[stepped.last_layer]
    forward = type(layer).forward
    steps = torch.arange(3).repeat_interleave(8)
    monkeypatch.setattr(CalibrationSet, "steps_of", lambda self, count: steps)

    def shifted(self: Any, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = forward(self, x)
        return output + (10.0 * (steps == 2)[:, None] if self is layer and self.weights_enabled else 0.0)

    monkeypatch.setattr(type(layer), "forward", shifted)
    report = correct_output(stepped, pictures())
    assert report.shift < 1 and correct_output(plain, pictures()).shift < 1


def test_a_constant_channel_and_a_ruined_one_get_a_shift_only() -> None:
    whole = float_model(Network())
    with torch.no_grad():
        whole.module.get_parameter("fc.weight")[0] = 0.0
    model = QuantModel.build(whole, "W3A3")
    Rtn().apply(model, pictures(), Rng(0))
    layer = model.layers[model.last_layer]
    assert layer.weight_quantizer is not None
    with torch.no_grad():
        layer.weight_quantizer.scale[1] *= 10
    before = layer.weight_quantizer.scale.clone()
    correct_output(model, pictures())
    assert torch.equal(layer.weight_quantizer.scale[:2], before[:2])
    assert slopes_and_means(model)[1].abs().max() < 1e-4


def test_a_checkpoint_holds_it(tmp_path: Path) -> None:
    model = quantized(Network())
    correct_output(model, pictures())
    save_checkpoint(model, tmp_path / "model")
    again = load_checkpoint(tmp_path / "model", float_model=model.float_model)
    batch = next(iter(CalibrationSet(model, pictures()).batches()))
    with torch.no_grad():
        assert torch.equal(batch.call(again), batch.call(model))


class Twice(nn.Module):
    """Runs the layer that makes its output twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 8 * 8, 6)
        self.last = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.last(self.first(x.flatten(1))).relu())


def test_what_cannot_be_corrected_is_one_line() -> None:
    with pytest.raises(UnsupportedModelError, match="last, which makes the output, does not run exactly once"):
        correct_output(quantized(Twice()), pictures())
    with pytest.raises(ModelError, match="not calibrated yet"):
        correct_output(QuantModel.build(float_model(Network()), "W4A4"), pictures())


def test_a_recipe_asks_for_it() -> None:
    values = {"method": "rtn", "scheme": "W3A3", "output_correction": True}
    section = QuantizeSection.parse(values, "here")
    model, report = make.quantize(float_model(Network()), section, pictures(), 0)
    assert report.output_correction is not None and slopes_and_means(model)[1].abs().max() < 1e-5
    assert section.needs_images[-1] == "quantize.output_correction"
    plain = QuantizeSection.parse({"method": "rtn", "scheme": "W3A3"}, "here")
    assert "output_correction" not in plain.model_dump(mode="json")
