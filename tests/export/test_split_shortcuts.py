"""ONNX files of networks whose shortcuts are split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.toy_networks import InMemory
from torch import Tensor, nn

from synthquant.core.rng import Rng
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.signature import Inputs
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.rtn import Rtn

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")


class Up(nn.Module):
    """The way up of a UNet: a residual block that reads a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.norm, self.conv, self.skip = nn.GroupNorm(4, 16), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.stem(x))
        joined = torch.cat([nn.functional.interpolate(torch.relu(self.down(first)), scale_factor=2.0), first], 1)
        return self.out(self.conv(nn.functional.silu(self.norm(joined))) + self.skip(joined))


def quantized(mode: str, samples: InMemory, **scheme: Any) -> QuantModel:
    torch.manual_seed(0)
    module = Up().eval().requires_grad_(False)
    model = FloatModel(module, samples.inputs.rows(0, 3), "up", ModelSource(source="toy/up"), "other")
    fields = {"preset": "W7A8", "ends": "same", "weights": {"symmetric": True}, "split_shortcuts": mode, **scheme}
    quant_model = QuantModel.build(model, QuantScheme.parse(fields))
    Rtn(observer="minmax").apply(quant_model, samples, Rng(0))
    return quant_model


@pytest.mark.parametrize(("mode", "cuts"), [("skip", 0), ("all", 1)])
def test_every_half_runs_on_integers_and_joined_tensors_are_not_cut_again(mode: str, cuts: int, tmp_path: Path) -> None:
    from synthquant.export.onnx import Onnx
    from synthquant.export.onnx.layers import integer_coverage

    samples = InMemory(Inputs((torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)))
    model, path = quantized(mode, samples, deploy="full"), tmp_path / "up.onnx"
    exporter = Onnx(preset="ort-cpu")
    exporter.export(model, path)
    exporter.verify(model, path, samples)
    coverage = integer_coverage(path)
    assert (coverage.floating, coverage.integer) == (0, 6 if mode == "skip" else 7)
    operators = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert operators.count("Split") == cuts


def test_files_of_the_papers_way_compute_the_same(tmp_path: Path) -> None:
    from synthquant.export.onnx import Onnx

    samples = InMemory(Inputs((torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)))
    model, path = quantized("skip", samples), tmp_path / "up.onnx"
    Onnx(preset="simulate").export(model, path)
    found = Onnx(preset="simulate").verify(model, path, samples)
    assert found["as_written"]["max_error"] < 1e-4
    assert "Split" not in {node.op_type for node in onnx.load(str(path)).graph.node}
