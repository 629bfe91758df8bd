"""PTQ4ViT: ranges with the smallest error of outputs, weighed by a gradient that is not zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.networks import Network, float_model
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.core.errors import SchemeError, UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.onnx import Onnx
from synthquant.nn.functional import fake_quantize
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.nn.twin_uniform import TwinUniformQuantizer
from synthquant.quantize import Ptq4Vit
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.ptq4vit import search_activation, search_weight
from synthquant.quantize.readers import Reader, drawn_loss, find_readers, record

SHARES = (0.3, 0.5, 0.7, 0.9)
TWIN = {
    "preset": "W4A4",
    "attention": {"softmax": {"num_bits": 4, "kind": "twin_uniform"}},
    "overrides": {"*.fc2": {"input_activations": {"kind": "twin_uniform"}}},
}


def pictures(count: int = 12) -> ImageSet:
    pixels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageSet.from_tensors(pixels, dtype="float16")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(x)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(3, 8, 4, stride=4), Block(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


def recorded(network: nn.Module, scheme: Any = "W4A4", count: int = 12) -> tuple[QuantModel, dict[str, Reader]]:
    model = QuantModel.build(float_model(network), QuantScheme.parse(scheme))
    samples = CalibrationSet(model, pictures())
    calibrate_weights(model, "minmax")
    calibrate_activations(model, samples, 12, "minmax", quantized_weights=False)
    readers = find_readers(model)
    record(model, samples, count, Rng(0).generator("answers"), readers)
    return model, {reader.name: reader for reader in readers}


def gradient(reader: Reader) -> Tensor:
    (call,) = reader.calls
    assert call.gradient is not None
    return call.gradient


def test_one_pass_records_all_with_gradients_that_are_not_zero() -> None:
    model, readers = recorded(Transformer(), TWIN, count=5)
    assert readers.keys() == {*model.layers, "block.matmul_0", "block.matmul_1"}
    assert all(float(gradient(reader).abs().max()) > 0 for reader in readers.values())
    assert {len(reader.calls[0].output) for reader in readers.values()} == {5}, "as many images as are asked for"
    for name, quantizer in model.quantizers.items():
        assert any(quantizer is one for reader in readers.values() for one in reader.quantizers.values()), name
    (of_head,) = readers["head"].calls
    shares = of_head.output.softmax(1)
    labels = gradient(readers["head"]).argmin(1)  # the gradient is softmax minus label, up to a factor
    wanted = shares - F.one_hot(labels, 5)
    factor = float((gradient(readers["head"]) / wanted).mean())
    assert torch.allclose(gradient(readers["head"]), factor * wanted, atol=1e-4)
    largest = sorted(float(gradient(reader).abs().max()) for reader in readers.values())
    assert 0.5 <= largest[-1] <= 1 and largest[0] < 0.5, "one factor for all"
    with model.mode(weights=False, activations=False):
        for reader in readers.values():
            assert torch.allclose(reader.calls[0].run({}), reader.calls[0].output, atol=1e-6), reader.name
    assert not any(getattr(part, "watcher", None) for part in model.module.modules())


def test_answers_are_drawn_from_the_networks_own() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(4000, 3).clone().requires_grad_()
    (found,) = torch.autograd.grad(drawn_loss(logits, "classify", torch.Generator().manual_seed(0)), logits)
    shares = logits[0].softmax(0).detach()
    assert torch.allclose(found.mean(0), torch.zeros(3), atol=0.02), "the score has no mean"
    assert torch.allclose(found.square().mean(0), shares * (1 - shares), atol=0.02), "its square is the Fisher matrix"
    means = torch.zeros(4000, 2, requires_grad=True)
    (found,) = torch.autograd.grad(drawn_loss({"a": means}, "other", torch.Generator().manual_seed(0)), means)
    assert torch.allclose(found.square().mean(0), torch.ones(2), atol=0.1)


class OneMatters(nn.Module):
    """Two outputs of a layer, of which the classes depend on the first, which reads small values only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        read = x[:, 0].flatten(1)[:, :2] * torch.tensor([1.0, 20.0])
        return self.head(self.fc(read))


def test_errors_that_the_answer_depends_on_decide() -> None:
    """The range is narrow although that cuts most of the values off which nothing depends on."""
    chosen = []
    for weights in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])):
        model = QuantModel.build(float_model(OneMatters()), QuantScheme.parse({"preset": "W8A4", "ends": "same"}))
        with torch.no_grad():
            model.layers["fc"].float_weight.copy_(torch.eye(2))
            model.layers["head"].float_weight.copy_(
                torch.randn(5, 1, generator=torch.Generator().manual_seed(0)) * weights
            )
        model.quantizers["fc.input_quantizer"].fixed = False  # it is no image
        Ptq4Vit(candidates=40).apply(model, pictures(), Rng(0))
        chosen.append(float(model.quantizers["fc.input_quantizer"].scale))  # type: ignore[arg-type]
    assert chosen[0] < 0.2 * chosen[1]


def brute_error(reader: Reader, outputs: Tensor) -> Tensor:
    return ((outputs - reader.calls[0].output) * gradient(reader)).double().square()


@torch.no_grad()
def test_each_channel_of_a_weight_has_its_best_range() -> None:
    model, readers = recorded(Network(), {"preset": "W3A3", "ends": "same"})
    for name in ("blocks.0.conv1", "fc"):
        layer, reader = model.layers[name], readers[name]
        own = layer.weight_quantizer
        assert own is not None
        x, whole = model.quantizers[model.reads[name]].quantize(reader.calls[0].read(0)), own.scale.clone()
        errors = []
        for share in (1.0, *SHARES):
            rounded = fake_quantize(own.grouped(layer.float_weight), whole * share, own.zero_point, own.args.quant_max)
            weight = own.ungrouped(rounded)
            output = F.linear(x, weight, layer.bias) if name == "fc" else F.conv2d(x, weight, layer.bias, padding=1)
            errors.append(brute_error(reader, output).movedim(-1 if name == "fc" else 1, 0).flatten(1).sum(1))
        with model.mode(weights=True, activations=False):
            assert search_weight(reader, own, whole, SHARES)
            assert not search_weight(reader, own, whole, SHARES), "a second search changes nothing"
        shares = torch.tensor([1.0, *SHARES])[torch.stack(errors).argmin(0)]
        assert torch.allclose(own.scale.flatten(), whole.flatten() * shares)
        assert len(set(shares.tolist())) > 1


@torch.no_grad()
def test_factors_of_products_have_their_best_grid() -> None:
    _, readers = recorded(Transformer(), TWIN)
    reader = readers["block.matmul_1"]
    softmax, value = reader.quantizers[0], reader.quantizers[1]
    assert isinstance(softmax, TwinUniformQuantizer)
    x, v = reader.calls[0].read(0), reader.calls[0].read(1)
    present = {name: tensor.clone() for name, tensor in softmax.grid().items()}
    grids = [present, *softmax.candidates(0.0, 1.0, SHARES)]
    errors = []
    for grid in grids:
        softmax.load_grid(grid)
        errors.append(float(brute_error(reader, softmax.quantize(x) @ value.quantize(v)).sum()))
    softmax.load_grid(present)
    search_activation(softmax, list(readers.values()), SHARES)
    assert torch.equal(softmax.grid()["split"], grids[min(range(21), key=errors.__getitem__)]["split"])
    assert float(min(errors)) < float(max(errors))


class Shared(nn.Module):
    """Two layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.fc = (
            nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.fc((self.one(x) + 3 * self.two(x).relu()).mean((2, 3)))


@torch.no_grad()
def test_what_several_layers_read_serves_all_of_them() -> None:
    model, readers = recorded(Shared(), {"preset": "W4A3", "ends": "same"})
    assert model.reads["one"] == model.reads["two"]
    quantizer, own = model.quantizers[model.reads["one"]], [readers["one"], readers["two"]]
    shares = [step / 80 for step in range(1, 81)]
    present = {name: one.clone() for name, one in quantizer.grid().items()}
    grids = [present, *quantizer.candidates(0.0, float(readers["one"].calls[0].read(0).max()), shares)]
    with model.mode(weights=True, activations=False):
        quantizer.load_grid(present)
        search_activation(quantizer, [*readers.values()], shares)
        chosen = quantizer.grid()["scale"].clone()
        errors = torch.zeros(2, len(grids), dtype=torch.float64)
        for index, grid in enumerate(grids):
            quantizer.load_grid(grid)
            for row, one in enumerate(own):
                assert one.layer is not None
                read = quantizer.quantize(one.calls[0].read(0))
                errors[row, index] = brute_error(one, one.layer(read)).sum()
    best = int(errors.sum(0).argmin())
    assert torch.equal(chosen, grids[best]["scale"])
    assert best != int(errors[0].argmin()), "the first alone would take another"


def test_where_nothing_depends_on_it_the_whole_range_stays() -> None:
    model = QuantModel.build(float_model(Network()), "W4A4")
    with torch.no_grad():
        model.layers["fc"].float_weight.zero_()
    calibrate_weights(model, "minmax")
    whole = {
        name: layer.weight_quantizer.scale.clone() for name, layer in model.layers.items() if layer.weight_quantizer
    }
    Ptq4Vit().apply(model, pictures(), Rng(0))
    for name in ("stem", "blocks.0.conv1"):
        own = model.layers[name].weight_quantizer
        assert own is not None and torch.equal(own.scale, whole[name])


def test_a_transformer_gets_closer_and_is_saved(tmp_path: Path) -> None:
    model = QuantModel.build(float_model(Transformer()), QuantScheme.parse(TWIN))
    plain = QuantModel.build(float_model(Transformer()), QuantScheme.parse(TWIN))
    samples = CalibrationSet(plain, pictures())
    calibrate_weights(plain, "minmax")
    calibrate_activations(plain, samples, 12, "minmax", quantized_weights=False)
    Ptq4Vit(candidates=30).apply(model, pictures(), Rng(0))
    of_gelu = model.quantizers["block.fc2.input_quantizer"]
    assert isinstance(of_gelu, TwinUniformQuantizer) and float(of_gelu.split) == 0
    (batch,) = samples.batches()
    with torch.no_grad():
        wanted = model.float_model.logits(batch.tensors[0])
        errors = [float((one(batch.tensors[0]) - wanted).norm()) for one in (model, plain)]
        assert errors[0] < errors[1]
        loaded = load_checkpoint(save_checkpoint(model, tmp_path / "model"), float_model=model.float_model)
        assert torch.equal(loaded(batch.tensors[0]), model(batch.tensors[0]))
    Onnx(preset="simulate").check(model)
    with pytest.raises(SchemeError, match=r"ort-cpu cannot express block\.\S+: .*kind 'twin_uniform'"):
        Onnx(preset="ort-cpu").check(model)


def test_killed_in_between_it_comes_to_the_same(tmp_path: Path) -> None:
    method = Ptq4Vit(candidates=10, rounds=2)
    models = [QuantModel.build(float_model(Transformer()), QuantScheme.parse(TWIN)) for _ in range(2)]
    report = method.apply(models[0], pictures(), Rng(0), workdir=tmp_path)
    files = sorted((tmp_path / "ptq4vit").iterdir())
    assert len(files) == len(report.units) == 8, "six layers and two products, which share nothing"
    for path in files[3:]:
        path.unlink()
    again = method.apply(models[1], pictures(), Rng(0), workdir=tmp_path)
    assert again.units[:3] == report.units[:3]
    state = models[1].state()
    assert all(torch.equal(value, state[name]) for name, value in models[0].state().items())


class Undifferentiable(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def test_an_answer_without_a_gradient_is_refused() -> None:
    model = QuantModel.build(float_model(Undifferentiable()), "W4A4")
    with pytest.raises(UnsupportedModelError, match="Undifferentiable: its answer has no gradient"):
        Ptq4Vit().apply(model, pictures(), Rng(0))
