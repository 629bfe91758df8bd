"""A kind of activation quantizer that only this file knows passes every stage, and what every kind promises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

import pytest
import torch
from tests.small_networks import small_float_model, small_images
from torch import nn
from torch.nn import functional as F

from synthquant import pipeline
from synthquant.core.errors import SchemeError
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.data.preprocess import Preprocess
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.onnx import Onnx
from synthquant.export.presets import PRESETS
from synthquant.export.quant_config import CONFIG_NAME
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.nn.activation_quantizers import QUANTIZER_KINDS, ActivationQuantizer, new_quantizer
from synthquant.nn.observers import Watcher
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantArgs, QuantScheme
from synthquant.quantize import Brecq
from synthquant.recipe import Recipe

KIND = "powers_of_two"
HEADS = 2


class Largest:
    """The largest absolute value of each head, `[H, 1, 1]`."""

    def __init__(self) -> None:
        self.found: torch.Tensor | None = None
        self.empty = True

    def observe_range(self, x: torch.Tensor) -> None:
        largest = by_head(x).abs().amax((0, 2, 3), keepdim=True)[0]
        self.found = largest if self.found is None else torch.maximum(self.found, largest)

    def observe(self, x: torch.Tensor) -> None:
        self.empty = False


class PowersOfTwo(ActivationQuantizer):
    """`sign(x) * scale * 2**-q` for codes `q` of 0 .. quant_max; one learned scale for each head of `[B, H, N, K]`."""

    def __init__(self, args: QuantArgs) -> None:
        super().__init__(args)
        self.scale = nn.Parameter(torch.ones(1, 1, 1), requires_grad=False)

    def fit_to(self, x: torch.Tensor) -> None:
        heads = by_head(x).shape[1]
        self.scale = nn.Parameter(torch.ones(heads, 1, 1, device=x.device), requires_grad=False)

    def new_watcher(self) -> Largest:
        return Largest()

    def set_range(self, watcher: Watcher, observer: str) -> None:
        found = cast(Largest, watcher).found
        assert found is not None
        self.scale.copy_(found * self.headroom)

    def cover(self, low: float, high: float) -> None:
        self.scale.fill_(max(abs(low), abs(high)))

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.clamp(torch.round(-torch.log2(x.abs() / self.scale)), 0, 2**self.num_bits - 1)
        return torch.sign(x) * self.scale * torch.exp2(-codes)

    def quantize_learning(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        steps = (self.quantize(x) / self.scale).detach()
        y = self.scale * steps + x - x.detach()
        return y if keep is None else torch.lerp(x, y, keep)


def by_head(x: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, K]`; what has no heads has one."""
    return x if x.ndim == 4 else x.reshape(len(x), 1, 1, -1)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kind is there for this file's tests only."""
    QUANTIZER_KINDS.names()  # the package's own first
    monkeypatch.setattr(QUANTIZER_KINDS, "_own", dict(QUANTIZER_KINDS._own))
    QUANTIZER_KINDS.register(KIND)(PowersOfTwo)
    yield


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, HEADS, 8 // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(Attention(), Attention())
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def network() -> FloatModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Transformer().eval().requires_grad_(False)
    for name, parameter in module.named_parameters():  # so that attention prefers something
        parameter.mul_(4 if "qkv.weight" in name else 1)
    preprocess = Preprocess(input_size=(16, 16), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return FloatModel(module, preprocess, "transformer", ModelSource(source="test"), num_classes=5)


SOFTMAX = QuantScheme.parse(
    {
        # few enough bits for CPUs that add two products in 16 bits
        "preset": "W7A6",
        "ends": "same",
        "deploy": "full",
        "weights": {"symmetric": True},
        "overrides": {"*.softmax_0": {"input_activations": {"kind": KIND, "num_bits": 3}}},
    }
)


def reconstructed(steps: int) -> tuple[QuantModel, QuantReport]:
    """Grids of activations learned, weights rounded to nearest."""
    model = QuantModel.build(network(), SOFTMAX)
    method = Brecq(iterations=0, activation_iterations=steps, batch_size=16, activation_lr=2e-4)
    return model, method.apply(model, small_images(16), Rng(0))


@pytest.fixture
def quantized() -> QuantModel:
    return reconstructed(0)[0]


def test_it_is_calibrated_and_learned_for_each_head() -> None:
    model, report = reconstructed(60)
    own = model.quantizers["blocks.1.softmax_0"]
    assert isinstance(own, PowersOfTwo) and own.scale.shape == (HEADS, 1, 1) and not own.scale.requires_grad
    for unit in report.units:
        if unit.losses and unit.name.startswith("blocks"):
            assert unit.loss_start is not None and unit.loss_end is not None and unit.loss_end < unit.loss_start
    start = reconstructed(0)[0]
    before = start.quantizers["blocks.1.softmax_0"].grid()["scale"]
    assert bool((before > 0).all()) and bool((before <= 1).all()) and bool((before != own.scale).all())
    x = torch.softmax(torch.randn(2, HEADS, 16, 16, generator=torch.Generator().manual_seed(0)), -1)
    codes = -torch.log2(own(x) / own.scale)
    assert torch.allclose(codes, codes.round(), atol=1e-5) and codes.min() >= 0 and codes.max() <= 7


def test_it_is_saved_and_loaded(quantized: QuantModel, tmp_path: Path) -> None:
    folder = save_checkpoint(quantized, tmp_path / "model")
    loaded = load_checkpoint(folder, float_model=quantized.float_model)
    x = quantized.float_model.example_images(4)
    assert torch.equal(loaded(x), quantized(x))
    assert json.loads((folder / CONFIG_NAME).read_text())["quantizers"]["blocks.0.softmax_0"]["kind"] == KIND


def test_it_is_shown_in_coverage(quantized: QuantModel, tmp_path: Path) -> None:
    rows = {row.name: row for row in quantized.coverage()}
    product = rows["blocks.0.matmul_1"]
    assert (product.input_bits, product.weight_bits, product.reason) == (3, 6, "")
    assert product.input_kind == f"{KIND} and affine"
    assert rows["blocks.0.matmul_0"].input_kind == rows["blocks.0.qkv"].input_kind == "affine"
    assert "input_kind" in asdict(product)
    everywhere = QuantModel.build(
        small_float_model(tmp_path), QuantScheme.parse({"preset": "W8A8", "input_activations": {"kind": KIND}})
    )
    multiplying = [row for row in everywhere.coverage() if row.macs or row.parameters]
    assert {(row.input_kind, row.reason) for row in multiplying} == {(KIND, "")}, "grids are no weights"


def test_simulate_writes_it_and_integer_presets_refuse_it_by_name(quantized: QuantModel, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    exporter = Onnx(preset="simulate")
    path = exporter.export(quantized, tmp_path / "net.onnx")
    found = exporter.verify(quantized, path, small_images(16))
    assert found["as_written"]["mean_error"] < 1e-3 and found["optimized"]["mean_error"] < 1e-3
    with pytest.raises(SchemeError, match=rf"ort-cpu cannot express blocks\.0\.softmax_0: .*kind '{KIND}'"):
        Onnx(preset="ort-cpu").export(quantized, tmp_path / "no.onnx")


def test_in_the_papers_way_a_softmax_has_it_too(tmp_path: Path) -> None:
    softmax = {"softmax": {"kind": KIND, "num_bits": 3}}
    scheme = QuantScheme.parse({"preset": "W4A4", "attention": softmax})
    model = QuantModel.build(network(), scheme)
    own = model.quantizers["blocks.0.matmul_1.input_quantizer_0"]
    assert isinstance(own, PowersOfTwo) and own.scale.shape == (HEADS, 1, 1)
    assert {row.name: row for row in model.coverage()}["blocks.0.matmul_1"].input_kind == f"{KIND} and affine"
    assert f"softmax 3 bit {KIND} per tensor" in scheme.describe()
    Onnx(preset="simulate").check(model)
    with pytest.raises(SchemeError, match=rf"ort-cpu cannot express blocks\.0\.matmul_1\..*kind '{KIND}'"):
        Onnx(preset="ort-cpu").check(model)


def test_a_preset_refuses_it_before_anything_is_made(tmp_path: Path) -> None:
    Onnx(preset="simulate").check(QuantModel.build(network(), SOFTMAX))
    small_float_model(tmp_path)
    form = {"input_size": [16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    values = {
        "model": {"source": f"{tmp_path}/small_network.py:build", **form},
        "images": {"method": "noise", "count": 8},
        "quantize": {
            "method": "rtn",
            "target": "tensorrt",
            "scheme": {"preset": "W8A8", "input_activations": {"kind": KIND}},
        },
    }
    with pytest.raises(SchemeError, match=rf"preset tensorrt cannot express stem\.input_quantizer: .*kind '{KIND}'"):
        pipeline.run(Recipe.parse(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [*QUANTIZER_KINDS.names(), KIND])
def test_every_kind_keeps_its_promises(kind: str) -> None:
    args = QuantArgs(num_bits=4, kind=kind)
    x = torch.randn(3, HEADS, 5, 6, generator=torch.Generator().manual_seed(0))
    x = x.softmax(-1) if QUANTIZER_KINDS.get(kind).non_negative else x
    quantizer, other = new_quantizer(args), new_quantizer(args)
    for one in (quantizer, other):
        one.fit_to(x)
    quantizer.watcher, quantizer.watching_range = quantizer.new_watcher(), True
    quantizer(x)
    assert quantizer.watcher.empty
    quantizer.watching_range = False
    assert quantizer(x) is x and not quantizer.watcher.empty
    quantizer.calibrate("minmax")
    y = quantizer(x)
    assert y.shape == x.shape and not torch.equal(y, x) and float((y - x).abs().mean()) < 0.2
    assert torch.allclose(quantizer(y), y, atol=1e-6), "values of the grid stay"
    other.load_grid({name: tensor.clone() for name, tensor in quantizer.grid().items()})
    assert torch.equal(other(x), y)
    quantizer.learning = True
    for parameter in quantizer.learnable():
        parameter.requires_grad_(True)
    inputs = x.clone().requires_grad_(True)
    learned = quantizer(inputs)
    assert torch.allclose(learned, y, atol=1e-6)
    learned.square().sum().backward()
    assert inputs.grad is not None and all(one.grad is not None for one in quantizer.learnable())
    quantizer.quantize_probability, quantizer.generator = 1 / 256, torch.Generator().manual_seed(0)
    assert float((quantizer(x) == x).float().mean()) > 0.9
    other.fix(-2.0, 3.0)
    assert other.fixed and float((other(x.clamp(-2, 3)) - x.clamp(-2, 3)).abs().max()) < 0.75
    with torch.no_grad():
        for parameter in quantizer.learnable():
            parameter.fill_(-1.0)
    quantizer.keep_legal()
    assert all(bool((parameter > 0).all()) for parameter in quantizer.learnable())
    assert quantizer.whole_numbers <= quantizer.grid().keys()
    assert quantizer.affine == (kind == "affine")


def test_a_scheme_says_which_kinds_there_are() -> None:
    with pytest.raises(SchemeError, match="unknown quantizer kind 'powers_of_to'; did you mean 'powers_of_two'"):
        QuantScheme.parse({"preset": "W8A8", "input_activations": {"kind": "powers_of_to"}})
    with pytest.raises(SchemeError, match="weights cannot have kind 'powers_of_two'"):
        QuantScheme.parse({"preset": "W8A8", "weights": {"kind": KIND}})
    with pytest.raises(SchemeError, match="input_activations cannot have strategy 'channel'; only 'tensor'"):
        QuantScheme.parse({"preset": "W8A8", "input_activations": {"strategy": "channel"}})
    assert (
        f"activations 8 bit {KIND} per tensor"
        in QuantScheme.parse({"preset": "W8A8", "input_activations": {"kind": KIND}}).describe()
    )
    assert "kind" not in QuantScheme.parse("W4A4").model_dump_json()


def test_the_export_guide_s_table_is_what_presets_take() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "export.md").read_text(encoding="utf-8")
    found = guide.partition("<!-- results:kinds -->\n")[2].partition("<!-- /results -->")[0].splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("| ").split("|")] for line in found]
    assert rows[0] == ["kind", *PRESETS] and [row[0] for row in rows[2:]] == [
        kind for kind in QUANTIZER_KINDS.names() if kind != KIND
    ]
    for kind, *taken in rows[2:]:
        assert taken == ["yes" if preset.takes(kind) else "no" for preset in PRESETS.values()]
    assert [name for name, preset in PRESETS.items() if preset.takes(KIND)] == ["simulate"]
