"""Checkpoints that keep their float network: they load without its code, to the same bits, or are not written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import synthquant as sq
from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.core.progress import QUIET
from synthquant.export.float_graph import GRAPH_NAME, float_graph
from synthquant.export.graph_network import network_of_graph
from synthquant.models.float_model import FloatModel


class Narrow(nn.Module):
    """A block whose shortcut reads what its layers read."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU6())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        mixed = (query @ key.transpose(-2, -1) * 0.5).softmax(-1) @ value
        return x + mixed.transpose(1, 2).reshape(batch, tokens, width)


class Head(nn.Module):
    """Joins nothing: its layer is a unit of its own, which only its class tells apart from a block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.up(F.relu(x))
        return maps


class Network(nn.Module):
    """Stem of another class than the blocks, attention, two inputs' worth of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.Hardswish())
        self.blocks = nn.Sequential(Narrow(8), Narrow(8), Narrow(8))
        self.attention = nn.ModuleList([Attention(8), Attention(8)])
        self.head = Head()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.blocks(self.stem(x))
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        for block in self.attention:
            tokens = block(tokens)
        maps = tokens.transpose(1, 2).reshape(batch, channels, height, width)
        return {"maps": self.head(maps), "mean": tokens.mean(1)}


@pytest.fixture(scope="module")
def network() -> FloatModel:
    torch.manual_seed(0)
    return FloatModel.from_module(Network(), input_size=12, mean=(0.5,) * 3, std=(0.5,) * 3)


def quantized(model: FloatModel, deploy: str) -> sq.QuantModel:
    images = torch.rand(4, 3, *model.preprocess.input_size, generator=torch.Generator().manual_seed(1))
    return sq.quantize(model, images, {"preset": "W4A8", "deploy": deploy}, method="rtn", progress=QUIET)


@pytest.fixture(scope="module")
def kept(network: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("float_graph") / "kept"
    quant_model = quantized(network, "papers")
    quant_model.save(folder, float_graph=True)
    torch.save(quant_model(torch.ones(2, 3, 12, 12))["maps"], folder.parent / "maps.pt")
    return folder


def test_it_loads_without_its_code_to_the_same_bits(network: FloatModel, tmp_path: Path) -> None:
    quant_model = quantized(network, "full")
    quant_model.save(tmp_path / "kept", float_graph=True)
    loaded = sq.load(tmp_path / "kept", trust_code=True)
    example = network.example(5)
    before, after = example.call(quant_model), example.call(loaded)
    assert all(torch.equal(before[name], after[name]) for name in ("maps", "mean"))
    assert list(loaded.layers) == list(quant_model.layers) and list(loaded.quantizers) == list(quant_model.quantizers)
    assert loaded.units("block") == quant_model.units("block") and len(quant_model.units("block")) > 5
    of_graph = loaded.float_model
    assert not of_graph.recorded_fingerprint and of_graph.fingerprint == network.fingerprint
    assert torch.equal(example.call(of_graph.module)["maps"], example.call(network.module)["maps"])


def test_units_are_found_by_the_classes_that_there_were() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(Narrow(8), Narrow(8)), Head())
    model = FloatModel.from_module(module, input_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, task="dense")
    again = replace(model, module=network_of_graph(float_graph(model))[0])
    units = [[unit.name for unit in quantized(one, "papers").units("block")] for one in (model, again)]
    assert units[0] == units[1] == ["0", "1.0", "1.1", "2.up"]


def test_another_process_without_the_class_loads_it(kept: Path) -> None:
    code = (
        "import synthquant as sq, torch, sys\n"
        "found = sq.load(sys.argv[1], trust_code=True)(torch.ones(2, 3, 12, 12))['maps']\n"
        "assert torch.equal(found, torch.load(sys.argv[1] + '/../maps.pt'))"
    )
    subprocess.run([sys.executable, "-c", code, str(kept)], check=True)


def test_it_is_read_with_trust_alone(kept: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(kept, tmp_path / "copy")
    with pytest.raises(ModelError, match="must not run code: if you know it, give --trust-code"):
        sq.load(folder)
    assert sq.load(folder, Network()).float_model.name == "Network"
    graph = folder / GRAPH_NAME
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is damaged"):
        sq.load(folder, trust_code=True)
    graph.unlink()
    with pytest.raises(ModelError, match="is not complete"):
        sq.load(folder, trust_code=True)


def test_without_it_a_checkpoint_stays_as_it_was(network: FloatModel, tmp_path: Path) -> None:
    quant_model = quantized(network, "papers")
    quant_model.save(tmp_path / "plain")
    assert not (tmp_path / "plain" / GRAPH_NAME).exists()
    assert "float_graph" not in (tmp_path / "plain" / "quant_config.json").read_text()


def test_a_graph_that_cannot_stand_in_is_one_line_and_no_folder(tmp_path: Path) -> None:
    padded = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")  # two operations in one layer
    module = nn.Sequential(nn.Conv2d(3, 4, 3), padded, nn.Conv2d(4, 4, 3))
    model = FloatModel.from_module(module, input_size=8, mean=(0.5,) * 3, std=(0.5,) * 3, task="dense")
    with pytest.raises(UnsupportedModelError, match=r"cannot stand in for its code: .*leave float_graph out"):
        quantized(model, "papers").save(tmp_path / "kept", float_graph=True)
    assert not list(tmp_path.iterdir())


def test_a_loaded_architecture_has_no_weights_to_keep(network: FloatModel, tmp_path: Path) -> None:
    quantized(network, "papers").save(tmp_path / "plain")
    torch.manual_seed(1)
    loaded = sq.load(tmp_path / "plain", Network())
    with pytest.raises(ModelError, match="float weights of Network are not there"):
        loaded.save(tmp_path / "kept", float_graph=True)
