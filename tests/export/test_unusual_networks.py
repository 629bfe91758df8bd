"""Networks that use layers in unusual ways are exported and counted truly, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.networks import float_model
from torch import nn
from torch.nn import functional as F

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.export.onnx import Onnx
from synthquant.export.onnx.layers import count_layers, integer_coverage
from synthquant.export.torch_program import TorchProgram
from synthquant.methods import QUANTIZERS
from synthquant.nn.quant_model import QuantModel

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FULL: dict[str, Any] = {"preset": "W8A8", "weights": {"symmetric": True}, "deploy": "full"}


class Shared(nn.Module):
    """Heads that run twice, a look at a weight's type, and a layer that reads a stored tensor."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.head, self.fc, self.mlp = nn.Conv2d(4, 4, 1), nn.Linear(4, 5), nn.Linear(2, 1)
        self.register_buffer("table", torch.linspace(-1, 1, 8).reshape(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x.to(self.stem.weight.dtype)))
        gate = torch.sigmoid(self.mlp(self.table)).flatten()
        one = self.head(x).to(self.fc.weight.dtype).mean((2, 3)) * gate
        two = self.head(x * 0.5).mean((2, 3))
        return self.fc(one) + self.fc(two)


class Standardised(nn.Conv2d):
    """Multiplies with a weight that it computes from its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std(), self.bias)


class Computed(nn.Module):
    """Two such layers, and an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = Standardised(3, 4, 3), Standardised(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


class Specialised(nn.Module):
    """Finds its way back to the batch by dividing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 4, 4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.stem(x).flatten(2).transpose(1, 2).reshape(-1, 4)
        return self.fc(rows.view(int(rows.shape[0] / 4), 4, 4).mean(1))


def rounded(network: nn.Module) -> QuantModel:
    model = QuantModel.build(float_model(network), FULL)  # type: ignore[arg-type]
    inputs = model.float_model.preprocess.cut_off(model.float_model.example_images(8))
    pictures = ImageSet.from_tensors(model.float_model.preprocess.pixels(inputs), dtype="float16")
    QUANTIZERS.get("rtn")().apply(model, pictures, Rng(0))
    return model


def test_layers_that_run_twice_and_are_looked_at(tmp_path: Path) -> None:
    model = rounded(Shared())
    path = Onnx().export(model, tmp_path / "shared.onnx")
    names = [node.name for node in onnx.load(str(path)).graph.node]
    assert len(set(names)) == len(names)
    assert {"head/bias", "head/bias_2", "fc/bias", "fc/bias_2"} <= set(names)
    found = integer_coverage(path)
    assert (found.integer, found.floating) == (6, 0)  # head and fc twice
    loaded = TorchProgram().export(model, tmp_path / "shared.pt2")
    x = model.float_model.example_images(3)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(loaded).module()(x), model(x), atol=1e-4)


def test_a_computed_weight_is_counted_as_float(tmp_path: Path) -> None:
    found = integer_coverage(Onnx().export(rounded(Computed()), tmp_path / "computed.onnx"))
    assert (found.integer, found.floating, found.share) == (1, 2, 1 / 3)
    assert sorted(found.float_layers) == ["one/Conv", "two/Conv"]
    assert (found.products_integer, found.products_floating) == (0, 0)


def test_every_kind_of_product_is_counted() -> None:
    graph = onnx.parser.parse_graph("""
        net (float[2, 3] x, float[3, 3] w) => (float[2, 3] y) <float[3, 3] w = {1, 0, 0, 0, 1, 0, 0, 0, 1}> {
            turned = Transpose(w)
            a = MatMul(x, turned)
            b = MatMul(w, a)
            c = Einsum<equation = "ij,jk->ik">(b, w)
            one = Einsum<equation = "ij->ji">(c)
            attention = MatMul(a, c)
            d = MatMulInteger(x, w)
            h, last = GRU<hidden_size = 3>(attention, w, w)
            y = Add(h, attention)
        }""")
    found = count_layers(graph)
    assert (found.integer, found.floating) == (1, 4)
    assert (found.products_integer, found.products_floating) == (0, 1)


@pytest.mark.parametrize("exporter", [Onnx(), TorchProgram()])
def test_a_batch_that_becomes_a_constant_is_named(exporter: Onnx | TorchProgram, tmp_path: Path) -> None:
    model = rounded(Specialised())
    with pytest.raises(UnsupportedModelError, match=r"Specialised cannot be exported: .* int\(x.shape\[0\] / n\)"):
        exporter.export(model, tmp_path / "file")
    assert not (tmp_path / "file").exists()


class View(nn.Module):
    """Reads a view of what it changes in place afterwards, by its return value."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 4, 1), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        half = x[:, :2]
        x = x.relu_()
        return self.fc((self.next(half) + x).mean((2, 3)))


class OldView(View):
    """The same, under the old name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        half = x[:, :2]
        x.relu_()
        return self.fc((self.next(half) + x).mean((2, 3)))


def test_a_view_of_what_changes_in_place() -> None:
    model = rounded(View())
    inputs = model.float_model.preprocess.cut_off(model.float_model.example_images(8))
    with torch.no_grad():
        wanted = model.float_model.module(inputs)
        assert float((model(inputs) - wanted).norm() / wanted.norm()) < 0.1
    with pytest.raises(UnsupportedModelError, match=r"^add_0 in the network's own forward reads relu_0 without its"):
        rounded(OldView())
