"""An encoder of torch's with all of its products quantized passes every stage behind synthesis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.networks import float_model
from tests.nn.test_rewrites import Padded
from tests.small_networks import small_images
from torch import nn

from synthquant.core.rng import Rng
from synthquant.export import TorchProgram
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.onnx import Onnx
from synthquant.nn.coverage import summarize
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import Brecq, GenieM, Rtn


class Encoder(nn.Module):
    """An encoder layer, then an attention with two masks."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch, self.head = nn.Conv2d(3, 16, 4, stride=4), nn.Linear(16, 5)
            self.encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
            self.causal = nn.Buffer(torch.ones(4, 4, dtype=torch.bool).triu(1))
        self.batch_first = batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        padding = torch.zeros_like(x[:, :, 0]).bool()
        x = self.encoder(x if self.batch_first else x.transpose(0, 1))
        x = x + self.attention(x, x, x, attn_mask=self.causal, key_padding_mask=padding)[0]
        return self.head(x.mean(1 if self.batch_first else 0))


def built(batch_first: bool, **scheme: Any) -> QuantModel:
    return QuantModel.build(float_model(Encoder(batch_first)), QuantScheme.parse(scheme))


def test_an_encoder_at_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = built(True, preset="W4A4", attention={})
    rows = model.coverage()
    products = [row for row in rows if row.kind == "matmul"]
    assert [(row.input_bits, row.weight_bits) for row in products] == [(4, 4)] * 4
    assert summarize(rows).multiply_adds == 1 and len(model.layers) == 2 + 6 + 4
    method = GenieM(iterations=10, batch_size=8, calibration_images=16)
    report = method.apply(model, small_images(16), Rng(0))
    assert {unit.name for unit in report.units} >= {"encoder", "attention.q_proj"}
    folder = save_checkpoint(model, tmp_path / "model")
    loaded = load_checkpoint(folder, float_model=model.float_model)
    x = model.float_model.example_images(4)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    exporter = Onnx(preset="simulate")
    found = exporter.verify(model, exporter.export(model, tmp_path / "net.onnx"), small_images(16))
    assert found["as_written"]["mean_error"] < 1e-4 and found["optimized"]["mean_error"] < 1e-3


def test_an_encoder_on_integers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    # few enough bits for CPUs that add two products in 16 bits
    model = built(False, preset="W7A8", ends="same", deploy="full", weights={"symmetric": True})
    Rtn(calibration_images=16).apply(model, small_images(16), Rng(0))
    exporter = Onnx(preset="ort-cpu")
    found = exporter.verify(model, exporter.export(model, tmp_path / "net.onnx"), small_images(16))
    assert found["layers"]["floating"] == found["layers"]["products_floating"] == 0
    assert found["layers"]["products_integer"] == 4
    program = TorchProgram()
    program.verify(model, program.export(model, tmp_path / "net.pt2"), small_images(16))


@pytest.mark.parametrize("fisher", ["diagonal", "full"])
def test_tokens_first_or_samples_first_is_the_same(fisher: str) -> None:
    """Units whose samples lie in the second dimension learn what their twins learn."""
    models = [built(first, preset="W4A8") for first in (True, False)]
    method = Brecq(iterations=12, activation_iterations=0, batch_size=8, calibration_images=16, fisher=fisher)
    reports = [method.apply(model, small_images(16), Rng(0)) for model in models]
    assert [unit.name for unit in reports[1].units] == [unit.name for unit in reports[0].units]
    for one, other in zip(*(report.units for report in reports), strict=True):
        assert one.loss_start == pytest.approx(other.loss_start, rel=1e-3), one.name
        assert one.loss_end == pytest.approx(other.loss_end, rel=1e-3), one.name
    for name, layer in models[0].layers.items():
        assert layer.weight_quantizer and (twin := models[1].layers[name].weight_quantizer)
        assert torch.equal(layer.weight_quantizer.codes, twin.codes), name


def test_a_unit_that_is_given_a_mask_of_infinities_learns() -> None:
    network = Padded(2, enable_nested_tensor=False)  # torch's encoder hands its layers a mask of 0 and -inf
    model = QuantModel.build(float_model(network), QuantScheme.parse({"preset": "W4A4", "attention": {}}))
    method = GenieM(iterations=20, batch_size=8, calibration_images=16)
    report = method.apply(model, small_images(16), Rng(0))
    layers = [unit for unit in report.units if unit.name.startswith("encoder.layers.")]
    assert len(layers) == 2 and not report.diverged
    assert all(unit.loss_end and unit.loss_start and unit.loss_end < unit.loss_start for unit in layers)
