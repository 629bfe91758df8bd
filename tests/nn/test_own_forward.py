"""Modules whose forward was set on the instance are quantized, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import pytest
import torch
from tests.nn.networks import Network, float_model
from tests.nn.test_quant_model import images, ready
from torch import nn
from torch.nn import functional as F

from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.export.deploy import Arithmetic, deploy
from synthquant.export.presets import find_preset
from synthquant.methods import QUANTIZERS
from synthquant.nn.own_forward import copy_network
from synthquant.nn.quant_model import QuantModel

ELSEWHERE: list[nn.Module] = []


def by_method(layer: nn.Linear) -> None:
    def doubled(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return 2 * F.linear(x, self.weight, self.bias)

    layer.forward = MethodType(doubled, layer)  # type: ignore[method-assign]


def by_partial(layer: nn.Linear) -> None:
    """As accelerate's hooks do."""

    def doubled(module: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * module._old_forward(x)

    layer._old_forward = layer.forward  # type: ignore[assignment]
    layer.forward = update_wrapper(partial(doubled, layer), layer._old_forward)  # type: ignore[method-assign, arg-type]


def by_closure(layer: nn.Linear) -> None:
    former, parts = layer.forward, {"factor": torch.tensor(2.0), "layers": [layer]}

    def doubled(x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
        assert parts["layers"]
        return former(x) * parts["factor"] * times

    layer.forward = doubled  # type: ignore[method-assign]


def by_default(layer: nn.Linear) -> None:
    layer.forward = lambda x, itself=layer: 2 * F.linear(x, itself.weight, itself.bias)  # type: ignore[method-assign]


def by_global_name(layer: nn.Linear) -> None:
    ELSEWHERE[:] = [layer]
    layer.forward = lambda x: 2 * F.linear(x, ELSEWHERE[0].weight, ELSEWHERE[0].bias)  # type: ignore[method-assign, arg-type]


WAYS = [by_method, by_partial, by_closure, by_default]


@pytest.mark.parametrize("deployment", ["papers", "full"])
@pytest.mark.parametrize("change", WAYS)
@torch.no_grad()
def test_it_computes_with_the_codes(change: Callable[[nn.Linear], None], deployment: str) -> None:
    wanted = float_model(Network()).module(images())
    model = float_model(Network())
    change(model.module.fc)
    quantized = ready(QuantModel.build(model, {"preset": "W8A8", "deploy": deployment}))  # type: ignore[arg-type]
    assert torch.equal(model.module(images()), 2 * wanted), "the float network is as it was"
    with quantized.mode(weights=False, activations=False):
        assert torch.allclose(quantized(images()), 2 * wanted, atol=1e-6)
    before = quantized(images())
    quantized.layers["fc"].weight_quantizer.codes.add_(1)  # type: ignore[union-attr]
    assert not torch.equal(quantized(images()), before), "the codes are what it multiplies with"
    assert {row.name: (row.kind, row.weight_bits) for row in quantized.coverage()}["fc"] == ("Linear", 8)


@pytest.mark.parametrize("change", WAYS)
@torch.no_grad()
def test_a_copy_of_the_copy_is_its_own(change: Callable[[nn.Linear], None]) -> None:
    model = float_model(Network())
    change(model.module.fc)
    first = copy_network(model.module)
    second = copy.deepcopy(first)
    expected = first(images())
    first.fc.weight.zero_()  # type: ignore[operator, union-attr]
    assert torch.equal(second(images()), expected)
    assert torch.equal(model.module(images()), expected)
    quantized = ready(QuantModel.build(model, {"preset": "W8A8", "deploy": "full"}))  # type: ignore[arg-type]
    deployed = deploy(quantized, find_preset("simulate"), Arithmetic())
    assert torch.allclose(deployed(images()), quantized(images()), atol=1e-4)


def test_a_function_that_refers_to_itself_and_to_nothing() -> None:
    network = Network()

    def repeat(x: torch.Tensor, times: int = 2) -> torch.Tensor:
        return x if times == 0 else repeat(x + 1, times - 1)

    network.fc.forward = repeat  # type: ignore[method-assign]
    network.stem.forward = torch.relu  # type: ignore[method-assign]
    copied = copy_network(network)
    assert torch.equal(copied.fc(torch.zeros(2)), torch.full((2,), 2.0))  # type: ignore[operator]
    assert torch.equal(copied.stem(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))  # type: ignore[operator]
    assert "forward" in network.fc.__dict__ and "forward" not in copied.fc.__dict__  # type: ignore[union-attr]


def test_a_function_that_goes_on_with_the_original_is_refused_by_name() -> None:
    model = float_model(Network())
    by_global_name(model.module.fc)
    with pytest.raises(UnsupportedModelError, match=r"^module 'fc' goes on computing with fc\.(weight|bias) of the"):
        QuantModel.build(model, "W8A8")


@pytest.mark.parametrize("method", ["rtn", "genie_m"])
def test_it_is_still_there_after_a_method(method: str) -> None:
    model = float_model(Network())
    by_partial(model.module.blocks[1].conv1)
    by_closure(model.module.fc)
    quantized = QuantModel.build(model, "W8A8")
    settings = {} if method == "rtn" else {"iterations": 2, "batch_size": 2}
    pixels = model.preprocess.pixels(model.preprocess.cut_off(images(4)))
    QUANTIZERS.get(method)(**settings).apply(quantized, ImageSet.from_tensors(pixels, dtype="float16"), Rng(0))
    assert quantized.calibrated
    with torch.no_grad():
        error = float((quantized(images()) - model.module(images())).norm() / model.module(images()).norm())
    assert error < 0.1, "twice in two places: without its own forward the output would be another one"


class Sometimes(nn.Module):
    """Runs a layer for bright images only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bright, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = bool(x.mean() < 1)
        x = self.stem(x)
        return self.fc((self.bright(x) if bright else x).mean((2, 3)))


def test_a_quantizer_that_saw_nothing_is_named() -> None:
    quantized = QuantModel.build(float_model(Sometimes()), "W8A8")
    white = ImageSet.from_tensors(torch.ones(4, 3, 8, 8), dtype="float16")
    with pytest.raises(ModelError, match=r"the quantizer bright\.input_quantizer saw no data while ranges were set"):
        QUANTIZERS.get("rtn")().apply(quantized, white, Rng(0))


def test_a_quantizer_that_would_never_run_is_named() -> None:
    class Hidden(nn.Linear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) if not hasattr(self, "input_quantizer") else F.linear(x, self.weight, self.bias)

    network = Network()
    network.fc = Hidden(6, 5)
    with pytest.raises(UnsupportedModelError, match=r"the quantizer fc\.input_quantizer would never run"):
        QuantModel.build(float_model(network), "W8A8")
