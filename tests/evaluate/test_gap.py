"""Images held out beside those that a network was quantized with: against a loop over single images."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest
import torch
from tests.small_networks import small_float_model, small_images

from synthquant import make
from synthquant.core.errors import UnsupportedModelError
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.evaluate.gap import measure_gap
from synthquant.models.float_model import FloatModel
from synthquant.nn.quant_model import QuantModel
from synthquant.recipe import QuantizeSection


def quantized(model: FloatModel, images: ImageSet) -> QuantModel:
    section = QuantizeSection.parse({"method": "rtn", "scheme": "W3A3"}, "test")
    return make.quantize(model, section, images, 0)[0]


def one_by_one(model: FloatModel, network: QuantModel, images: ImageSet) -> tuple[list[float], list[bool]]:
    ratios, same = [], []
    with torch.no_grad():
        for image in model_inputs(images, model.preprocess):
            wanted, found = model.module(image[None])[0].tolist(), network(image[None])[0].tolist()
            noise = sum((a - b) ** 2 for a, b in zip(wanted, found, strict=True))
            ratios.append(10 * math.log10(sum(a * a for a in wanted) / noise))
            same.append(wanted.index(max(wanted)) == found.index(max(found)))
    return ratios, same


def test_both_sets_are_measured_image_by_image(tmp_path: Path) -> None:
    model, seen, unseen = small_float_model(tmp_path), small_images(9), small_images(7, seed=3)
    network = quantized(model, seen)
    gap = measure_gap(network, seen, unseen, float_model=model, batch_size=4)
    (first, same), (second, others) = one_by_one(model, network, seen), one_by_one(model, network, unseen)
    assert (gap.count, gap.held_out_count) == (9, 7)
    assert gap.sqnr == pytest.approx(statistics.mean(first), abs=1e-3)
    assert gap.held_out_sqnr == pytest.approx(statistics.mean(second), abs=1e-3)
    error = math.sqrt(statistics.variance(first) / 9 + statistics.variance(second) / 7)
    assert gap.error == pytest.approx(error, rel=1e-3)
    assert gap.agreement == statistics.mean(same) and gap.held_out_agreement == statistics.mean(others)
    assert measure_gap(network, seen, seen, float_model=model, count=3).count == 3


class Total(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sum()


def test_outputs_that_are_of_no_single_image_are_refused() -> None:
    model = FloatModel.from_module(Total(), input_size=16, mean=(0.5,) * 3, std=(0.25,) * 3, task="other")
    network = quantized(model, small_images(4))
    with pytest.raises(UnsupportedModelError, match="images cannot be held out"):
        measure_gap(network, small_images(4), small_images(4, seed=1), float_model=model)
