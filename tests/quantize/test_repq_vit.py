"""RepQ-ViT: grids of channels behind layer norms become one grid that rounds every value alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.networks import Network, NormedTokens, float_model
from torch import Tensor, nn

from synthquant import pipeline
from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.onnx import Onnx
from synthquant.make import quantize
from synthquant.models.float_model import FloatModel
from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.build import folded_copy
from synthquant.nn.equalization import Equalization
from synthquant.nn.functional import fake_quantize
from synthquant.nn.layer_norms import layers_behind_norms
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import RepqVit, Rtn
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.equalize import equalized
from synthquant.quantize.reparameterize import Reparameterization, reparameterization
from synthquant.recipe import QuantizeSection, Recipe

LAYERS = {
    "block.norm": ("block.q", "block.k", "block.v"),
    "block.gain": ("block.fc1",),
    "merge": ("reduce",),
    "norm": ("head",),
}
KEPT = {"kept": "add_0 reads it too"}


def network(change: Callable[[NormedTokens], object] = lambda net: None) -> FloatModel:
    """Channels of layer norms of very different sizes, around means of their own."""
    model = float_model(NormedTokens(), size=16)
    net, generator = model.module, torch.Generator().manual_seed(1)
    assert isinstance(net, NormedTokens)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "norm" in name or "merge" in name or "gain" in name or "offset" in name:
                value.copy_(torch.exp(2 * torch.randn(value.shape, generator=generator)))
        change(net)
    return model


def images(count: int = 16) -> ImageSet:
    return ImageSet.from_tensors(torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(2)))


def found(model: FloatModel, scheme: Any = "W4A4") -> tuple[QuantModel, Reparameterization]:
    quant_model = QuantModel.build(model, QuantScheme.parse(scheme))
    return quant_model, reparameterization(quant_model, CalibrationSet(quant_model, images()), 16, "percentile")


def applied(model: FloatModel, scheme: Any = "W4A4") -> tuple[QuantModel, QuantReport]:
    quant_model = QuantModel.build(model, QuantScheme.parse(scheme))
    return quant_model, RepqVit().apply(quant_model, images(), Rng(0))


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_only_layers_that_alone_read_a_layer_norm_take_part() -> None:
    quant_model, report = applied(network())
    assert report.reparameterization is not None
    assert report.reparameterization.norms == tuple(LAYERS) and report.reparameterization.left_out == KEPT
    groups, left = layers_behind_norms(folded_copy(network())[0], network().example(2))
    assert {group.norm: group.layers for group in groups} == LAYERS and left == KEPT
    assert str(report.reparameterization) == "reparameterised 4 layer norms, left out: kept (add_0 reads it too)"
    assert quant_model.equalization is not None
    changed = {name.rpartition(".")[0] for name in quant_model.equalization.tensors()}
    norms = {"block.norm.weight", "block.norm.bias", "block.gain", "block.offset"}
    norms |= {f"{norm}.{parameter}" for norm in ("merge", "norm") for parameter in ("weight", "bias")}
    assert changed == norms | {layer for layers in LAYERS.values() for layer in layers}


@pytest.mark.parametrize("deploy", ["papers", "full"])
@torch.no_grad()
def test_the_float_network_computes_the_same(deploy: str) -> None:
    model = network()
    quant_model, _ = applied(model, {"preset": "W4A4", "deploy": deploy})
    x = model.example_images(8)
    assert quant_model.equalization is not None
    with quant_model.mode(weights=False, activations=False):
        assert difference(quant_model(x), model.module(x)) < 1e-4
    exact = copy.deepcopy(model.module).double()
    wanted = exact(x.double())
    quant_model.equalization.apply(exact)
    assert difference(exact(x.double()), wanted) < 1e-10
    assert difference(exact.block.norm.weight, model.module.block.norm.weight.double()) > 0.1, "it is another network"


@torch.no_grad()
def test_one_grid_rounds_as_the_grids_of_channels_did() -> None:
    model = network()
    quant_model, way = found(model)
    assert way.grids.keys() == {"block.q.input_quantizer", "block.fc1.input_quantizer", "reduce.input_quantizer",
                                "head.input_quantizer"}  # fmt: skip
    plain = copy.deepcopy(model.module).double()
    changed = copy.deepcopy(plain)
    way.equalization.apply(changed)
    x = model.example_images(16).double()
    for norm, layers in LAYERS.items():
        for layer in layers:
            name = quant_model.reads[layer]
            grids, top = way.grids[name], quant_model.quantizers[name].args.quant_max
            assert torch.equal(grids.zero_point, grids.zero_point.round())
            assert torch.equal(grids.mean_zero_point, grids.mean_zero_point.round())
            assert 0 <= float(grids.mean_zero_point) <= top
            read, wanted = reading(plain, layer, x), reading(changed, layer, x)
            by_channel = fake_quantize(read, grids.scale, grids.zero_point, top)
            by_tensor = fake_quantize(wanted, grids.mean_scale, grids.mean_zero_point, top)
            one = plain.get_submodule(layer)(by_channel)
            other = changed.get_submodule(layer)(by_tensor)
            assert difference(other, one) < 1e-9, (norm, layer)
            spread = by_channel.flatten(0, -2).amax(0) - by_channel.flatten(0, -2).amin(0)
            assert float(spread.max() / spread.min()) > 4, "the channels differ"


def reading(net: nn.Module, layer: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_pre_hook(lambda part, args: seen.append(args[0]))
    net(x)
    handle.remove()
    return seen[0]


def test_the_quantized_network_has_ordinary_grids() -> None:
    quant_model, _ = applied(network())
    _, way = found(network())
    for name, grids in way.grids.items():
        quantizer = quant_model.quantizers[name]
        assert isinstance(quantizer, AffineQuantizer) and quantizer.scale.shape == (1,)
        assert float(quantizer.scale) == float(grids.mean_scale)
        assert float(quantizer.zero_point) == float(grids.mean_zero_point)
    for layer in quant_model.layers.values():  # weights were calibrated anew
        assert layer.weight_quantizer is not None
        wanted = copy.deepcopy(layer.weight_quantizer)
        wanted.calibrate(layer.float_weight, "percentile")
        assert torch.equal(layer.weight_quantizer.codes, wanted.codes)


@torch.no_grad()
def test_it_helps_where_channels_differ() -> None:
    model = network()
    x = model.example_images(64)
    wanted = model.module(x)
    errors = []
    for method in (RepqVit(), Rtn(observer="percentile", calibration_images=32)):
        quant_model = QuantModel.build(model, QuantScheme.parse({"preset": "W8A4", "ends": "same", "attention": None}))
        method.apply(quant_model, images(), Rng(0))
        errors.append(float((quant_model(x) - wanted).square().mean()))
    assert errors[0] < 0.75 * errors[1]


@torch.no_grad()
def test_dead_channels_do_not_blow_up() -> None:
    def kill(net: NormedTokens) -> None:
        net.norm.weight[2], net.norm.bias[2] = 0, 0
        net.norm.weight[3], net.norm.bias[3] = 1e-12, 5
        net.block.gain[1], net.block.offset[1] = 0, -3

    model = network(kill)
    quant_model, way = found(model)
    for grids in way.grids.values():
        assert float(grids.factor.min()) >= 1e-3 * 0.999
    quant_model, _ = applied(model)
    x = model.example_images(8)
    with quant_model.mode(weights=False, activations=False):
        assert difference(quant_model(x), model.module(x)) < 1e-4
    assert all(
        bool(value.isfinite().all()) and float(value.abs().max()) < 1e5 for value in quant_model.module.parameters()
    )


@pytest.mark.parametrize(
    "scheme", ["W4A4", {"preset": "W6A6", "input_activations": {"symmetric": True}, "ends": "same"}]
)
@torch.no_grad()
def test_a_checkpoint_holds_it(tmp_path: Path, scheme: Any) -> None:
    quant_model, _ = applied(network(), scheme)
    loaded = load_checkpoint(save_checkpoint(quant_model, tmp_path / "model"), float_model=quant_model.float_model)
    x = quant_model.float_model.example_images(4)
    assert torch.equal(loaded(x), quant_model(x))
    assert loaded.equalization is not None and quant_model.equalization is not None
    assert loaded.equalization.fingerprint == quant_model.equalization.fingerprint
    with pytest.raises(ModelError, match="holds no float weights"):
        RepqVit().apply(loaded, images(), Rng(0))


def test_reconstruction_starts_from_it() -> None:
    settings = {"method": "genie_m", "iterations": 5, "batch_size": 8, "calibration_images": 16}
    section = QuantizeSection.parse({"scheme": "W4A4", "equalize": "layer_norms", **settings}, "here")
    assert section.needs_images[1:] == ("quantize.equalize layer_norms",)
    model = network()
    learned, report = quantize(model, section, images(), 0)
    assert report.units and learned.equalization is not None
    wanted = equalized(QuantModel.build(model, "W4A4"), "layer_norms", images()).equalization
    assert wanted is not None and learned.equalization.fingerprint == wanted.fingerprint
    x = model.example_images(4)
    with torch.no_grad(), learned.mode(weights=False, activations=False):
        assert difference(learned(x), model.module(x)) < 1e-4


@torch.no_grad()
def test_two_equalisations_are_one() -> None:
    one, two = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    two.load_state_dict(one.state_dict())
    first, second = (
        Equalization(
            rows={"1": factor * torch.tensor([2.0, 3.0])},
            columns={"1": factor * torch.tensor([4.0, 5.0, 6.0])},
            shifts={"1": factor * torch.tensor([7.0, 8.0])},
            norms={"0.weight": torch.full((3,), factor), "0.bias": torch.full((3,), factor)},
            norm_shifts={"0.bias": factor * torch.tensor([1.0, 2.0, 3.0])},
        )
        for factor in (1.5, -0.5)
    )
    first.apply(one)
    second.apply(one)
    first.then(second).apply(two)
    for name, value in one.named_parameters():
        assert torch.allclose(two.get_parameter(name), value), name
    with pytest.raises(ModelError, match=r"does not fit parameter 1\.gain of this network: no such parameter"):
        Equalization(norms={"1.gain": torch.ones(3)}).apply(one)


def test_the_written_network_is_the_quantized_one(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    scheme = {"preset": "W4A4", "attention": {"softmax": {"num_bits": 8}}}
    quant_model, _ = applied(network(), scheme)
    assert quant_model.quantizers["block.matmul_1.input_quantizer_0"].num_bits == 8
    exporter = Onnx(preset="simulate")
    result = exporter.verify(quant_model, exporter.export(quant_model, tmp_path / "net.onnx"), images())
    assert result["as_written"]["mean_error"] < 1e-4 and result["optimized"]["mean_error"] < 1e-3


class Mixed(nn.Module):
    """A layer norm whose channels a layer reads in another order, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.mix, self.twice = nn.Conv2d(3, 4, 4, stride=4), nn.LayerNorm(4), nn.LayerNorm(4)
        self.tokens, self.bare, self.last = nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)[:, :, :2, :2].flatten(2).transpose(1, 2)  # as many tokens as channels
        x = self.tokens(self.mix(x).transpose(1, 2))
        x = self.last(self.bare(self.twice(self.twice(x))))
        return self.head(x.mean(1))


def test_what_does_not_fit_is_left_and_named() -> None:
    _, left = layers_behind_norms(folded_copy(float_model(Mixed(), size=16))[0], float_model(Mixed(), 16).example(2))
    assert left == {
        "mix": "tokens does not read its channels in their order alone",
        "twice": "it runs several times, or something else computes with its parameters",
        "bare": "it has no weight for each channel",
    }
    model = network()
    quant_model = QuantModel.build(model, QuantScheme.parse({"preset": "W4A4", "ignore": ["reduce"]}))
    report = RepqVit().apply(quant_model, images(), Rng(0)).reparameterization
    assert report is not None and report.left_out["merge"] == "reduce reads it in floating point"
    different = {"preset": "W4A4", "overrides": {"block.q": {"input_activations": {"num_bits": 6}}}}
    report = applied(model, different)[1].reparameterization
    assert report is not None
    assert report.left_out["block.norm"] == "block.q, block.k, block.v read it on different grids"


class Moody(nn.Module):
    """Normalises what is small once more."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.patch(x).flatten(2).transpose(1, 2))
        return self.head((x if x.max() > 2.5 else self.norm(x)).mean(1))


def test_layer_norms_that_depend_on_values_are_an_error() -> None:
    network = float_model(Moody(), size=16)
    network.module.norm.weight.data.fill_(0.01)  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match="the layer norms that run depend on what they read"):
        layers_behind_norms(network.module, network.example(2))


def test_without_a_layer_norm_it_says_so_in_one_line() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"^Network: there is no layer norm whose .*; there is no layer norm at all$"
    ):
        applied(float_model(Network(), size=16))
    with pytest.raises(
        UnsupportedModelError, match=r"\(mix: tokens does not .*; twice: it runs several times.*, and 1 more\)$"
    ):
        applied(float_model(Mixed(), size=16))
    with pytest.raises(UnsupportedModelError, match="reads it in floating point"):
        applied(network(), "W4A16")


@pytest.mark.parametrize("quantize_by", [{"method": "repq_vit"}, {"method": "rtn", "equalize": "layer_norms"}])
def test_a_run_says_so_before_it_makes_images(tmp_path: Path, quantize_by: dict[str, str]) -> None:
    values = {"model": "zoo/cifar10-resnet20", "images": {"method": "noise", "count": 4}}
    recipe = Recipe.parse({**values, "quantize": {"scheme": "W4A4", **quantize_by}})
    with pytest.raises(UnsupportedModelError, match=r"^cifar10-resnet20: .* there is no layer norm at all$"):
        pipeline.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def logits(kind: str) -> tuple[nn.Module, int]:
    """A small network of each library, and how many of its layer norms take part."""
    if kind.startswith("timm"):
        timm = pytest.importorskip("timm")
        small = {"num_classes": 5, "img_size": 16, "patch_size": 4, "embed_dim": 16}
        if kind == "timm swin":
            from timm.models.swin_transformer import SwinTransformer

            return SwinTransformer(**{**small, "patch_size": 2}, depths=(2, 1), num_heads=(2, 2), window_size=2), 7
        if kind == "timm deit":
            from timm.models.deit import VisionTransformerDistilled

            return VisionTransformerDistilled(**small, depth=1, num_heads=2), 2
        return timm.models.vision_transformer.VisionTransformer(**small, depth=1, num_heads=2), 3
    if kind == "transformers vit":
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)
        return Logits(transformers.ViTForImageClassification(config)), 3
    models = pytest.importorskip("torchvision").models
    if kind == "torchvision vit":
        return models.VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=5), 3
    return models.SwinTransformer([2, 2], 8, [2, 1], [2, 2], [2, 2], num_classes=5), 7


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


@pytest.mark.parametrize(
    "kind", ["timm vit", "timm deit", "timm swin", "transformers vit", "torchvision vit", "torchvision swin"]
)
@torch.no_grad()
def test_networks_of_the_libraries(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, count = logits(kind)
    model = float_model(module, size=16)
    quant_model, report = applied(model)
    assert report.reparameterization is not None
    assert len(report.reparameterization.norms) == count
    x = model.example_images(4)
    with quant_model.mode(weights=False, activations=False):
        assert difference(quant_model(x), model.module(x)) < 1e-4
