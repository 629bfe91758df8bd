"""The batch-norm distance whose weights are learned from corrupted images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.small_networks import small_float_model, small_images
from torch.nn import functional as F

from synthquant.core.errors import DataError, RecipeError, UnsupportedModelError
from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.core.settings import parse_settings
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.select import BatchNormDistance, BatchNormSensitivity, LearnedBatchNormDistance, run_filters
from synthquant.select.batch_norm import BatchNormProbe, gap_norms, layer_gaps, set_sensitivity, totals
from synthquant.select.corruptions import CORRUPTIONS, Corruption, corrupt
from synthquant.select.learned_batch_norm import learn_weights
from synthquant.select.scan import scan


class Listen(Progress):
    def __init__(self) -> None:
        self.told: list[str] = []

    def say(self, text: str) -> None:
        self.told.append(text)

    def warn(self, text: str) -> None:
        self.told.append(f"warning: {text}")


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("size", [(32, 32), (19, 30)])
def test_a_corrupted_image_is_another_image_of_the_same_size(kind: Corruption, size: tuple[int, int]) -> None:
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    before = image.clone()
    spoilt = corrupt(image, kind, Rng(0).generator("a"))
    assert torch.equal(image, before) and spoilt.shape == image.shape
    assert float(spoilt.min()) >= 0 and float(spoilt.max()) <= 1
    assert float((spoilt - image).abs().mean()) > 0.05
    assert torch.equal(spoilt, corrupt(image, kind, Rng(0).generator("a")))


def test_shuffling_moves_whole_patches_and_loses_none() -> None:
    image = torch.arange(3 * 8 * 13, dtype=torch.float32).view(3, 8, 13) / 312
    spoilt = corrupt(image, "shuffle", Rng(1).generator("a"))
    assert torch.equal(spoilt[..., 12:], image[..., 12:])

    def patches(pixels: torch.Tensor) -> list[tuple[float, ...]]:
        return [tuple(pixels[:, y : y + 2, x : x + 3].flatten().tolist()) for y in range(0, 8, 2) for x in (0, 3, 6, 9)]

    assert patches(spoilt) != patches(image) and sorted(patches(spoilt)) == sorted(patches(image))


def test_weights_are_the_minimum_that_was_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand(20, 5, generator=generator, dtype=torch.float64)
    spoilt = torch.rand(60, 5, generator=generator, dtype=torch.float64)
    spoilt[:, 0] += 0.8  # tells
    spoilt[:, 1] -= 0.4  # is smaller where images are spoilt: no distance
    plain[:, 2], spoilt[:, 2] = 3.0, 3.0  # never changes
    weights, accuracy = learn_weights(plain, spoilt, penalty=0.05)
    assert weights[0] == weights.max() > 0 and weights[1] == 0 and weights[2] == 0
    assert 0.8 < accuracy <= 1

    both = torch.cat([plain, spoilt])
    scale = both.std(0, correction=0)
    x = (both - both.mean(0)) / torch.where(scale > 0, scale, 1)
    sign = torch.cat([-torch.ones(20), torch.ones(60)]).double()
    share = torch.cat([torch.full((20,), 0.5 / 20), torch.full((60,), 0.5 / 60)]).double()

    def loss(scaled: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        odds = sign * (x @ scaled + offset)
        return (share * F.softplus(-odds)).sum() + 0.025 * scaled.square().sum()

    best = (weights * scale).requires_grad_()
    offsets = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    offset = offsets[torch.stack([loss(best.detach(), one) for one in offsets]).argmin()]
    (slope,) = torch.autograd.grad(loss(best, offset), best)
    # At the minimum the slope is 0, or leads below 0 where the weight is 0 already.
    assert slope[weights > 0].abs().max() < 1e-3
    assert slope[weights == 0].min() > -1e-3


def test_with_all_weights_alike_it_is_the_sensitivity_of_genq(model: FloatModel) -> None:
    probe = BatchNormProbe(model.module)
    table = scan(small_images(9), model, [probe]).tables[probe.name]
    layers = len(probe.norms.names)
    weights = torch.rand(2 * layers, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(2 * layers, dtype=torch.float64)
    assert torch.equal(set_sensitivity(table, probe.norms, weights=ones), set_sensitivity(table, probe.norms))

    def distance(rows: torch.Tensor) -> float:
        sums, squares = rows.double().sum(0).chunk(2)
        return float(gap_norms(sums, squares, len(rows), probe.norms) @ weights)

    assert distance(table) != pytest.approx(layer_gaps(*totals(table), len(table), probe.norms).sum().item())
    slow = [distance(table) - distance(torch.cat([table[:i], table[i + 1 :]])) for i in range(9)]
    assert set_sensitivity(table, probe.norms, weights=weights).tolist() == pytest.approx(slow, abs=1e-9)


def mixed_pool() -> tuple[ImageSet, torch.Tensor]:
    """200 photographs, each fourth spoilt in a way that the filter does not learn from: half of it is grey."""
    images = open_images("bundled/cifar10-test").subset(range(200))
    pixels = torch.stack([images[index].image for index in range(200)])
    spoilt = torch.arange(200) % 4 == 0
    pixels[spoilt, :, ::2] = 128
    return ImageSet.from_tensors(pixels), spoilt


def test_it_finds_images_spoilt_in_a_way_it_never_saw() -> None:
    model = open_model("zoo/cifar10-resnet20-half")
    pool, spoilt = mixed_pool()
    listen = Listen()
    filter_ = LearnedBatchNormDistance(keep=150, sample=200, set_size=20)
    steps = run_filters([filter_], pool, model, Rng(0), progress=listen).steps
    gone = ~steps[0].stayed
    assert int((gone & spoilt).sum()) >= 35  # of 50, 12.5 by chance
    assert len(listen.told) == 1 and listen.told[0].startswith("bn_learned tells plain from corrupted images in ")


def test_scores_do_not_depend_on_batches_and_follow_the_seed(model: FloatModel) -> None:
    images = small_images(24)
    filter_ = LearnedBatchNormDistance(keep=10, sample=16, set_size=4)
    first, second, other = (
        run_filters([filter_], images, model, Rng(seed), batch_size=size).steps[0].scores
        for seed, size in ((0, 24), (0, 5), (1, 24))
    )
    assert torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max()))
    assert not torch.allclose(first, other, rtol=1e-2)


def test_it_learns_from_what_earlier_filters_left(model: FloatModel) -> None:
    images = small_images(30)
    seen: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    filters = [BatchNormDistance(keep=12), LearnedBatchNormDistance(keep=5, corruptions=("noise", "blur"))]
    selection = run_filters(filters, images, model, Rng(0))
    handle.remove()
    assert sum(seen) == 30 + 2 * 12
    assert selection.steps[1].entered.tolist() == selection.steps[0].entered[selection.steps[0].stayed].tolist()
    # The rows of the pool are shared with the other filters on batch norms.
    again = run_filters([BatchNormDistance(keep=12), BatchNormSensitivity(keep=5)], images, model, Rng(0))
    assert list(selection.scan.tables) == list(again.scan.tables)


def test_weights_that_say_little_are_warned_of(model: FloatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchanged(pixels: torch.Tensor, kind: Corruption, generator: torch.Generator) -> torch.Tensor:
        return pixels

    monkeypatch.setattr("synthquant.select.learned_batch_norm.corrupt", unchanged)
    listen = Listen()
    run_filters([LearnedBatchNormDistance(keep=5, set_size=4)], small_images(24), model, Rng(0), progress=listen)
    assert len(listen.told) == 1 and listen.told[0].startswith("warning: bn_learned tells plain from corrupted images")


def test_too_few_images_and_wrong_settings_are_refused(model: FloatModel) -> None:
    with pytest.raises(DataError, match="bn_learned: weights are learned from two sets of two images at least; there"):
        run_filters([LearnedBatchNormDistance(keep=2)], small_images(3), model, Rng(0))
    with pytest.raises(RecipeError, match=r"select: corruptions\.0 .*rain"):
        parse_settings(LearnedBatchNormDistance, {"corruptions": ["rain"]}, "select")
    with pytest.raises(RecipeError, match=r"select: corruptions = .*name at least one corruption"):
        parse_settings(LearnedBatchNormDistance, {"corruptions": []}, "select")
    with pytest.raises(UnsupportedModelError, match="no batch norm"):
        run_filters([LearnedBatchNormDistance()], small_images(8), open_model("zoo/cifar10-vit"), Rng(0))
