"""One code for every family of networks: full-size architectures with random weights and small images."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from synthquant.core.modules import hooked
from synthquant.data.image_set import ImageSet
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.models.operation_names import QUANTIZABLE
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights

NETWORKS = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/regnet_y_400mf",
    "torchvision/mnasnet0_5",
    "timm/tf_efficientnet_lite0",
    "timm/convnext_atto",
    "timm/regnetx_002",
    "timm/resnet18",
)


@dataclass(frozen=True)
class Family:
    name: str
    float_model: FloatModel
    fingerprint: str
    model: QuantModel
    inputs: torch.Tensor
    """That the quantizers were calibrated on."""


def with_statistics(float_model: FloatModel) -> FloatModel:
    """Give batch norms the statistics of noise, so that signals neither die nor explode."""
    network = float_model.module
    for part in network.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = 1.0
    torch.manual_seed(0)
    with torch.no_grad():
        network.train()(float_model.example_images(8, seed=5))
    network.eval()
    return float_model


@pytest.fixture(scope="module", params=NETWORKS)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        opened = open_model(
            request.param, pretrained=False, input_size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
        )
        float_model = with_statistics(opened)
    fingerprint = float_model.fingerprint
    model = QuantModel.build(float_model, "W8A8")
    calibrate_weights(model, "minmax")
    inputs = float_model.preprocess.cut_off(float_model.example_images(4))
    noise = float_model.preprocess.pixels(inputs)
    calibration = CalibrationSet(model, ImageSet.from_tensors(noise, dtype="float16"))
    calibrate_activations(model, calibration, 4, "minmax", quantized_weights=True)
    yield Family(request.param, float_model, fingerprint, model, inputs)


@torch.no_grad()
def test_covers_every_layer_and_leaves_the_float_model_alone(family: Family) -> None:
    float_layers = [name for name, part in family.float_model.module.named_modules() if isinstance(part, QUANTIZABLE)]
    rows = [row for row in family.model.coverage() if row.macs]  # sums and the like multiply nothing
    assert sorted(row.name for row in rows) == sorted(float_layers)
    for row in rows:
        assert (row.reason, row.weight_bits, row.input_bits) == ("", 8, 8)
        assert row.macs > 0 and row.parameters > 0
        assert row.kind == type(family.float_model.module.get_submodule(row.name)).__name__
    assert family.model.calibrated
    assert family.float_model.fingerprint == family.fingerprint
    assert not any("Quant" in type(part).__name__ for part in family.float_model.module.modules())


@torch.no_grad()
def test_folding_alone_changes_nothing(family: Family) -> None:
    x = family.float_model.example_images(4)
    wanted = family.float_model.logits(x)
    with family.model.mode(weights=False, activations=False):
        folded = family.model(x)
    assert float((folded - wanted).norm() / wanted.norm()) < 1e-3


@torch.no_grad()
def test_every_layer_is_close_to_float_at_8_bits(family: Family) -> None:
    """Layer by layer on float inputs: a network of random weights makes any small error large at its end."""
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    layers = family.model.layers.values()

    def keep(layer: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen[layer] = (args[0].clone(), output.clone())

    with family.model.mode(weights=False, activations=False), hooked([(layer, keep) for layer in layers]):
        family.model(family.inputs)
    assert len(seen) == len(family.model.layers)
    for name, layer in family.model.layers.items():
        x, wanted = seen[layer]
        # The last convolution of a timm block puts out zeros to begin with.
        assert float((layer(x) - wanted).norm()) <= 0.2 * float(wanted.norm()) + 1e-4, name


@torch.no_grad()
def test_units_partition_the_layers(family: Family) -> None:
    names = list(family.model.layers)
    for granularity in ("block", "layer", "network"):
        units = family.model.units(granularity)
        assert sorted(name for unit in units for name in unit.layers) == sorted(names)
    assert len(family.model.units("network")) == 1
    assert 1 < len(family.model.units("block")) < len(family.model.units("layer")) == len(names)


@torch.no_grad()
def test_state_round_trip_and_deep_copies(family: Family) -> None:
    x = family.float_model.example_images(4)
    wanted = family.model(x)
    state = {name: tensor.clone() for name, tensor in family.model.state().items()}
    twin = copy.deepcopy(family.model)
    for name, layer in twin.layers.items():
        assert layer is twin.module.get_submodule(name) and layer is not family.model.layers[name]
        assert layer.weight_quantizer is not None
        layer.weight_quantizer.codes.zero_()
    for quantizer in twin.quantizers.values():
        quantizer.scale.data.mul_(3)
    assert not torch.equal(twin(x), wanted)
    assert torch.equal(family.model(x), wanted)
    twin.load_state(state)
    assert torch.equal(twin(x), wanted)
    found = twin.state()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
