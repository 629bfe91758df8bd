"""Bias correction: the mean error of every layer is taken out of its bias, layer after layer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.networks import Network, float_model
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from synthquant.core.errors import ModelError
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.models.signature import joined
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.bias_correction import correct_biases
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.rtn import Rtn


def pictures(count: int = 24) -> ImageSet:
    pixels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageSet.from_tensors(pixels, dtype="float16")


def quantized(network: nn.Module, scheme: Any = "W3A3") -> QuantModel:
    model = QuantModel.build(float_model(network), scheme)
    Rtn().apply(model, pictures(), Rng(0))
    return model


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["W3A3", {"preset": "W4A4", "deploy": "full"}])
def test_rounded_weights_leave_no_mean_error(scheme: Any) -> None:
    """On what each layer reads in the quantized network, corrected layers before it included."""
    model = quantized(Network(), scheme)

    def errors() -> dict[str, float]:
        found: dict[str, float] = {}

        def hook(layer: Any, args: Any, output: torch.Tensor, *, name: str) -> None:
            x = args[0] if layer.input_quantizer is None else layer.input_quantizer(args[0])
            add = functional.linear if isinstance(layer, nn.Linear) else functional.conv2d
            more = {} if isinstance(layer, nn.Linear) else {"padding": layer.padding}
            own = layer.bias if layer.float_bias is None else layer.float_bias
            error = add(x, layer.weight, layer.bias, **more) - add(x, layer.float_weight, own, **more)
            dims = [0] if error.ndim == 2 else [0, 2, 3]
            found[name] = float(error.mean(dims).abs().max())

        handles = [layer.register_forward_hook(partial(hook, name=name)) for name, layer in model.layers.items()]
        model(pictures_read(model))
        for handle in handles:
            handle.remove()
        return found

    before = errors()
    report = correct_biases(model, pictures())
    assert (report.images, report.layers, report.left_out) == (24, len(model.layers), ())
    assert min(before.values()) > 1e-4
    assert max(errors().values()) < 1e-5


def pictures_read(model: QuantModel) -> torch.Tensor:
    """All pictures as the network reads them."""
    return joined(list(CalibrationSet(model, pictures()).batches())).tensors[0]


def test_one_layer_by_hand() -> None:
    """With float activations the correction is `(W - W_hat) E[x]` (DFQ, arXiv:1906.04721, equation 17)."""
    model = quantized(OneLayer(), "W2A16")
    (layer,) = model.layers.values()
    x = pictures_read(model).flatten(1)
    wanted = layer.bias + (layer.float_weight - layer.weight) @ x.mean(0)
    correct_biases(model, pictures())
    assert torch.allclose(layer.bias, wanted, atol=1e-5)


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


class WithoutBias(nn.Module):
    """A convolution and a linear layer without bias, and one layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.twice(torch.relu(self.stem(x))))
        return self.fc(torch.relu(self.twice(x)).mean((2, 3)))


@torch.no_grad()
def test_layers_without_a_bias_get_one_that_is_saved(tmp_path: Path) -> None:
    model = quantized(WithoutBias())
    twice = model.layers["twice"].bias.clone()
    report = correct_biases(model, pictures())
    assert (report.layers, report.left_out) == (2, ("twice",))
    assert torch.equal(model.layers["twice"].bias, twice)
    assert float(model.layers["stem"].bias.abs().min()) > 0
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "saved"), float_model=model.float_model)
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def test_the_float_side_stays_the_float_network() -> None:
    model = quantized(WithoutBias())
    x = torch.rand(4, 3, 8, 8)
    correct_biases(model, pictures())
    corrected = model.layers["stem"].bias.clone()
    correct_biases(model, pictures())
    assert torch.allclose(model.layers["stem"].bias, corrected, atol=1e-6)
    with model.mode(weights=False, activations=False):
        assert torch.allclose(model(x), model.float_model.logits(x), atol=1e-6)


@torch.no_grad()
def test_a_bias_that_is_computed_stays() -> None:
    network = WithoutBias()
    network.twice = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1), "bias", dim=0)
    model = quantized(network)
    x = torch.rand(4, 3, 8, 8)
    assert correct_biases(model, pictures()).left_out == ("twice",)
    with model.mode(weights=False, activations=False):
        assert torch.allclose(model(x), model.float_model.logits(x), atol=1e-6)


def test_ranges_come_first() -> None:
    with pytest.raises(ModelError, match="not calibrated"):
        correct_biases(QuantModel.build(float_model(Network()), "W4A4"), pictures())
