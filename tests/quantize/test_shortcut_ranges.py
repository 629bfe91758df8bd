"""Ranges of the halves of concatenated shortcuts."""

from __future__ import annotations

import pytest
import torch
from tests.denoisers import denoiser
from tests.toy_networks import InMemory, toy
from torch import Tensor, nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.signature import Inputs
from synthquant.quantize.shortcut_ranges import shortcut_ranges


class Halves(nn.Module):
    """A tensor beside four times its square, read by one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.read = nn.Conv2d(3, 3, 1), nn.Conv2d(6, 2, 1)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(3)[:, :, None, None])
            self.stem.bias.zero_()
            self.read.weight.copy_(torch.arange(-6.0, 6.0).reshape(2, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.read(torch.cat([x, 4 * x**2], 1))


def test_ends_and_deviations_of_both_halves() -> None:
    x = torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    module = Halves().eval().requires_grad_(False)
    model = FloatModel(module, Inputs((x[:3],)), "halves", ModelSource(source="toy/halves"), "other")
    first, second = shortcut_ranges(model, InMemory(Inputs((x,))))
    for half, read in ((first, x), (second, 4 * x**2)):
        assert (half.layer, half.channels) == ("read", 3)
        assert (half.low, half.high) == pytest.approx((float(read.min()), float(read.max())))
        assert half.deviation == pytest.approx(float(read.square().mean().sqrt()))
    assert first.span == pytest.approx(float(x.max() - x.min())) and second.span == pytest.approx(
        float(4 * x.max() ** 2)
    )
    assert (first.part, second.part) == (0, 1)
    assert (first.weight_low, first.weight_high) == (-6, 2) and (second.weight_low, second.weight_high) == (-3, 5)
    assert second.weight_span == 8 and second.weight_deviation == pytest.approx((64 / 6) ** 0.5)
    (some, _) = shortcut_ranges(model, InMemory(Inputs((x,))), count=2)
    assert some.high == pytest.approx(float(x[:2].max()))


def test_modes_and_networks_without_shortcuts() -> None:
    one = denoiser("unet", 6)
    before = one.model.fingerprint
    names = {
        mode: {half.layer for half in shortcut_ranges(one.model, one.samples, mode=mode)} for mode in ("skip", "all")
    }  # type: ignore[arg-type]
    assert len(names["skip"]) == 4 and len(names["all"]) == 8 and names["skip"] < names["all"]
    assert one.model.fingerprint == before
    tokens = toy("tokens")
    with pytest.raises(UnsupportedModelError, match="tokens: no layer reads feature maps that were joined along"):
        shortcut_ranges(tokens.model, tokens.samples)
