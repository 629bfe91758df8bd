"""The parameterised filter's parts against their descriptions: what spoils an image, and which distance ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.small_networks import small_float_model, small_images
from torch.nn import functional as F

from synthquant.core.rng import Rng
from synthquant.methods import Candidates
from synthquant.select import LearnedBatchNormDistance
from synthquant.select.batch_norm import BatchNormProbe, set_sensitivity
from synthquant.select.corruptions import corrupt
from synthquant.select.learned_batch_norm import LearnedDistance
from synthquant.select.scan import scan


def image() -> torch.Tensor:
    return torch.rand(3, 32, 24, generator=torch.Generator().manual_seed(0))


def test_noise_is_gaussian_with_a_quarter_of_the_range() -> None:
    gray = torch.full((3, 64, 64), 0.5)
    added = corrupt(gray, "noise", torch.Generator().manual_seed(0)) - gray
    inside = added[added.abs() < 0.5]
    # The middle 95.45% of a Gaussian of deviation 0.25, which black and white cut off.
    assert len(inside) / added.numel() == pytest.approx(0.9545, abs=0.01)
    assert float((added.abs() < 0.25).float().mean()) == pytest.approx(0.6827, abs=0.02)
    assert float(added.mean()) == pytest.approx(0, abs=0.01)


def test_blur_keeps_the_mean_of_every_eight_by_eight_pixels_and_no_more() -> None:
    pixels = image()
    coarse = F.avg_pool2d(pixels[None], 8)
    wanted = F.interpolate(coarse, (32, 24), mode="bilinear")[0]
    torch.testing.assert_close(corrupt(pixels, "blur", torch.Generator()), wanted)


def test_colours_are_those_of_a_negative_with_its_channels_moved() -> None:
    pixels = image()
    found = [corrupt(pixels, "color", torch.Generator().manual_seed(seed)) for seed in range(8)]
    negatives = [1 - pixels.roll(shift, 0) for shift in (1, 2)]
    met = {next(index for index, one in enumerate(negatives) if torch.equal(one, spoilt)) for spoilt in found}
    assert met == {0, 1}


def test_images_are_ranked_by_the_distance_that_was_learned(tmp_path: Path) -> None:
    model = small_float_model(tmp_path)
    probe = BatchNormProbe(model.module)
    table = scan(small_images(12), model, [probe]).tables[probe.name]
    weights = torch.rand(2 * len(probe.norms.names), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    filter_ = LearnedBatchNormDistance(keep=5, set_size=32)
    candidates = Candidates(probe, table, torch.arange(12), small_images(12), model, Rng(0))
    scores = filter_.sensitivities(candidates, LearnedDistance(probe.norms, weights, 1.0))
    torch.testing.assert_close(scores, set_sensitivity(table, probe.norms, weights=weights))
    assert not torch.allclose(scores, set_sensitivity(table, probe.norms))
