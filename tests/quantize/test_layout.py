"""Where a unit's channels are, on outputs whose shapes do not tell."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.nn.networks import float_model
from torch import nn

from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.methods import MemoryBudget
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.genie_m import GenieM
from synthquant.quantize.layout import channels_last
from synthquant.quantize.reconstruct import Reconstruction

CONV = nn.Conv2d(4, 8, 3, padding=1)
TOKENS = nn.Linear(4, 8)
MAP, SEQUENCE = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4)

Unit = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    ("layer", "x", "forward", "wanted"),
    [
        (CONV, MAP, torch.relu, False),
        (CONV, MAP, lambda y: torch.cat([torch.ones_like(y), y], 1), False),
        (CONV, MAP, lambda y: torch.cat([y, MAP], 1), False),
        (CONV, MAP, lambda y: nn.functional.pixel_shuffle(y, 2), False),
        (CONV, MAP, lambda y: nn.functional.max_pool2d(y, 8), False),
        (CONV, MAP, lambda y: nn.functional.layer_norm(y.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2), False),
        (CONV, MAP, lambda y: y * torch.sigmoid(y.mean((2, 3), keepdim=True)), False),
        (CONV, MAP, lambda y: y.flatten(2), False),
        (CONV, MAP, lambda y: y.permute(0, 2, 3, 1), True),
        (CONV, MAP, lambda y: y.flatten(2).transpose(1, 2), True),
        (CONV, MAP, lambda y: y.mean((2, 3)), True),
        (TOKENS, SEQUENCE, torch.relu, True),
        (TOKENS, SEQUENCE, lambda y: torch.cat([torch.ones_like(y[:, :1]), y], 1), True),
        (TOKENS, SEQUENCE, lambda y: torch.cat([y, y], -1), True),
        (TOKENS, SEQUENCE, lambda y: nn.functional.layer_norm(y, (8,)), True),
        (TOKENS, SEQUENCE, lambda y: y.transpose(1, 2), False),
        (TOKENS, MAP, lambda y: y, True),
        (TOKENS, MAP.permute(0, 2, 3, 1), lambda y: y.permute(0, 3, 1, 2) + 1, False),
    ],
)
def test_channels_are_found_by_trying(layer: nn.Module, x: torch.Tensor, forward: Unit, wanted: bool) -> None:
    inputs = x if x.shape[-1] == 4 or layer is CONV else x.transpose(1, -1)
    assert channels_last(layer, lambda: forward(layer(inputs))) == wanted


@pytest.mark.parametrize("layer", [CONV, TOKENS])
def test_where_nothing_is_to_be_seen_the_layer_decides(layer: nn.Module) -> None:
    def run() -> torch.Tensor:
        layer(MAP if layer is CONV else SEQUENCE)
        return torch.zeros(1, 8, 8, 8)

    assert channels_last(layer, run) == (layer is TOKENS)
    assert not layer._forward_hooks


class Dense(nn.Module):
    """Ends in a concatenation; its layer has as many channels as the feature map is wide (DenseNet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.relu(self.conv(x))], 1)


class DenseNetwork(nn.Module):
    """Feature maps that are 8 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Dense(4), Dense(12))
        self.fc = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def test_a_block_that_ends_in_a_concatenation_puts_out_feature_maps() -> None:
    """The error of a unit sums over channels, of which there are 12, and averages over the 8 columns."""
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = ImageSet.from_tensors(pixels, dtype="float16")
    model = QuantModel.build(float_model(DenseNetwork()), "W3A4")
    report = GenieM(iterations=0).apply(model, images, Rng(0))
    engine = Reconstruction(model, CalibrationSet(model, images), "block", MemoryBudget(host_gib=1), None)
    assert [unit.name for unit in engine.units] == ["stem", "blocks.0", "blocks.1", "fc"]
    (x,) = next(CalibrationSet(model, images).batches()).tensors
    found = {}
    for weights in (False, True):
        with model.mode(weights=weights, activations=weights), torch.no_grad():
            found[weights] = model.module.blocks[0](model.module.stem(x))  # type: ignore[index, operator, union-attr]
    assert found[True].shape == (6, 12, 8, 8)
    wanted = (found[True] - found[False]).square().sum(1).mean()
    assert report.units[1].loss_end == pytest.approx(float(wanted), rel=1e-3)
