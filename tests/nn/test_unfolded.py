"""Networks that are quantized to be trained: batch norms that stay, copies whose float parameters take gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.small_networks import small_float_model, small_images
from torch import nn

from synthquant.core.errors import ModelError, RecipeError
from synthquant.core.rng import Rng
from synthquant.evaluate.agreement import measure_sqnr
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.quant_config import CONFIG_NAME
from synthquant.make import quantize
from synthquant.models.float_model import FloatModel
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import Rtn
from synthquant.quantize.equalize import equalized
from synthquant.recipe import QuantizeSection


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


def quantized(model: FloatModel, deploy: str = "papers", *, fold: bool = False) -> QuantModel:
    quant_model = QuantModel.build(model, QuantScheme.parse({"preset": "W4A8", "deploy": deploy}), fold=fold)
    Rtn(observer="minmax", calibration_images=8).apply(quant_model, small_images(8), Rng(0))
    return quant_model


def norms(quant_model: QuantModel) -> list[str]:
    return [name for name, part in quant_model.module.named_modules() if isinstance(part, nn.BatchNorm2d)]


@pytest.mark.parametrize("deploy", ["papers", "full"])
def test_batch_norms_stay_and_the_checkpoint_knows(model: FloatModel, deploy: str, tmp_path: Path) -> None:
    quant_model, x = quantized(model, deploy), model.example_images(4)
    assert norms(quant_model) == [name for name, part in model.module.named_modules() if type(part) is nn.BatchNorm2d]
    assert quant_model.folded == [] and quantized(model, deploy, fold=True).folded
    with torch.no_grad(), quant_model.mode(weights=False, activations=False):
        assert torch.allclose(quant_model(x), model.logits(x), atol=1e-5)
    folder = save_checkpoint(quant_model, tmp_path / "model")
    loaded = load_checkpoint(folder, float_model=model)
    assert norms(loaded) == norms(quant_model) and torch.equal(loaded(x), quant_model(x))
    assert json.loads((folder / CONFIG_NAME).read_text())["format_version"] == 5
    folded = json.loads((save_checkpoint(quantized(model, fold=True), tmp_path / "folded") / CONFIG_NAME).read_text())
    assert "fold" not in folded and folded["format_version"] == 2
    with pytest.raises(ModelError, match="channels are equalised in a network whose batch norms are folded"):
        equalized(quant_model, "weights", small_images(4))


def test_a_recipe_keeps_batch_norms(model: FloatModel, tmp_path: Path) -> None:
    values = {"method": "rtn", "scheme": "W4A8", "fold_batch_norms": False}
    section = QuantizeSection.parse(values, "recipe")
    quant_model, _ = quantize(model, section, small_images(8), 0)
    assert norms(quant_model) == [name for name, part in model.module.named_modules() if type(part) is nn.BatchNorm2d]
    assert QuantizeSection.model_validate(section.model_dump()).fold_batch_norms is False
    folded = QuantizeSection.parse({**values, "fold_batch_norms": True}, "recipe").model_dump()
    assert "fold_batch_norms" not in folded, "files without it stay the bytes they were"
    with pytest.raises(
        RecipeError, match=r"equalize 'weights' scales channels of folded .*; leave fold_batch_norms on"
    ):
        QuantizeSection.parse({**values, "equalize": "weights"}, "recipe")
    loaded = load_checkpoint(save_checkpoint(quant_model, tmp_path / "model"), float_model=model)
    assert measure_sqnr(loaded, small_images(4), float_model=model) == measure_sqnr(quant_model, small_images(4))


def test_a_trainable_copy_takes_gradients_where_nothing_is_quantized(model: FloatModel) -> None:
    quant_model, x = quantized(model), model.example_images(6)
    before, fingerprint = quant_model(x), model.fingerprint
    twin = quant_model.trainable_copy()
    assert torch.equal(twin(x), before) and twin.float_model is quant_model.float_model
    named = {name for name, parameter in twin.named_parameters() if parameter.requires_grad}
    assert {"module.norm.weight", "module.norm.bias", "module.fc.bias"} <= named
    assert not any(parameter.requires_grad for parameter in quant_model.parameters())
    quantized_parts = [*twin.quantizers.values(), *(layer.weight_quantizer for layer in twin.layers.values())]
    assert not any(parameter.requires_grad for part in quantized_parts if part for parameter in part.parameters())
    assert "module.fc.weight" not in named, "codes are not moved by gradients"
    wanted = model.logits(x)
    optimizer = torch.optim.SGD([parameter for parameter in twin.parameters() if parameter.requires_grad], lr=1e-3)
    twin.train()  # batch norms see batches
    losses = []
    with torch.enable_grad():
        for _ in range(2):
            for quantizer in twin.quantizers.values():
                quantizer.learning = True
            loss = (twin(x) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    norm, own = twin.module.get_submodule("norm"), quant_model.module.get_submodule("norm")
    assert not torch.equal(norm.running_mean, own.running_mean) and not torch.equal(norm.weight, own.weight)
    assert torch.equal(quant_model(x), before) and model.fingerprint == fingerprint


def test_where_a_network_is_follows_from_its_tensors(model: FloatModel) -> None:
    quant_model = quantized(model)
    assert model.device == quant_model.device == torch.device("cpu")
    assert quant_model.trainable_copy().to("meta").device.type == "meta" and quant_model.device.type == "cpu"
    assert model.to("meta").device.type == "meta"
