"""Sums of one pass against forward passes over the sets themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.small_networks import small_float_model, small_images
from torch import Tensor, nn

from synthquant.core.errors import DataError, UnsupportedModelError
from synthquant.core.modules import hooked
from synthquant.core.rng import Rng
from synthquant.data.preprocess import Preprocess, model_inputs
from synthquant.methods import Candidates
from synthquant.models.batch_norm import batch_norm_layers
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.select.batch_norm import (
    BatchNormDistance,
    BatchNormProbe,
    BatchNormSensitivity,
    Spread,
    layer_gaps,
    set_sensitivity,
    totals,
)
from synthquant.select.scan import scan

SPREADS: tuple[Spread, ...] = ("variance", "std")


def distance_of(model: nn.Module, images: Tensor, spread: Spread) -> float:
    """The definition: run the set, take mean and variance of every batch norm's input, add up the norms of the gaps."""
    layers = list(batch_norm_layers(model).values())
    gaps: list[float] = []

    def look(layer: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        values = args[0].double().transpose(0, 1).flatten(1)
        mean, variance = values.mean(1), values.var(1, correction=0)
        assert layer.running_mean is not None and layer.running_var is not None
        goal = layer.running_var.double()
        gap = variance - goal if spread == "variance" else variance.sqrt() - goal.sqrt()
        gaps.append(float((mean - layer.running_mean.double()).norm() + gap.norm()))

    with torch.no_grad(), hooked(pre=[(layer, look) for layer in layers]):
        model(images)
    return sum(gaps)


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


@pytest.fixture
def probed(model: FloatModel) -> tuple[BatchNormProbe, Tensor, Tensor]:
    """A filled probe, its table, and the images as the network sees them."""
    images = small_images(13)
    probe = BatchNormProbe(model.module)
    table = scan(images, model, [probe], batch_size=5).tables[probe.name]
    return probe, table, model_inputs(images, model.preprocess)


def among(model: FloatModel, probe: BatchNormProbe, table: Tensor, chosen: Tensor, seed: int = 0) -> Candidates:
    return Candidates(probe, table, chosen, small_images(13).subset(chosen), model, Rng(seed))


@pytest.mark.parametrize("spread", SPREADS)
def test_the_distance_of_a_set_is_that_of_its_forward_pass(
    model: FloatModel, probed: tuple[BatchNormProbe, Tensor, Tensor], spread: Spread
) -> None:
    probe, table, inputs = probed
    assert layer_gaps(*totals(table), len(table), probe.norms, spread).sum().item() == pytest.approx(
        distance_of(model.module, inputs, spread), rel=1e-5
    )
    some = torch.tensor([1, 4, 12])
    assert layer_gaps(*totals(table[some]), 3, probe.norms, spread).sum().item() == pytest.approx(
        distance_of(model.module, inputs[some], spread), rel=1e-5
    )


@pytest.mark.parametrize("spread", SPREADS)
def test_the_sensitivity_is_that_of_leaving_each_image_out(
    model: FloatModel, probed: tuple[BatchNormProbe, Tensor, Tensor], spread: Spread
) -> None:
    probe, table, inputs = probed
    whole = distance_of(model.module, inputs, spread)
    rest = [distance_of(model.module, torch.cat([inputs[:i], inputs[i + 1 :]]), spread) for i in range(len(inputs))]
    slow = whole - torch.tensor(rest, dtype=torch.float64)
    fast = set_sensitivity(table, probe.norms, spread)
    assert slow.std() > 1e-3  # else anything would be close to it
    assert torch.allclose(fast, slow, atol=1e-5 * whole, rtol=0)
    assert fast.argsort().tolist() == slow.argsort().tolist()


def test_the_distance_of_single_images(model: FloatModel, probed: tuple[BatchNormProbe, Tensor, Tensor]) -> None:
    probe, table, inputs = probed
    chosen = torch.tensor([0, 3, 7])
    scores = BatchNormDistance().scores(among(model, probe, table, chosen))
    slow = [distance_of(model.module, inputs[i : i + 1], "variance") for i in chosen.tolist()]
    assert scores.tolist() == pytest.approx(slow, rel=1e-5)


def test_sensitivity_is_the_mean_over_random_sets_that_hold_every_image_once(
    model: FloatModel,
    probed: tuple[BatchNormProbe, Tensor, Tensor],
) -> None:
    probe, table, _ = probed
    chosen = torch.arange(1, 13)
    filter_ = BatchNormSensitivity(set_size=5, partitions=3)
    expected = torch.zeros(12, dtype=torch.float64)
    generator = Rng(4).generator("partitions")
    for _ in range(3):
        order = torch.randperm(12, generator=generator)
        for members in (order[:4], order[4:8], order[8:]):  # 12 images in sets of nearly 5
            expected[members] += set_sensitivity(table[chosen[members]], probe.norms) / 3
    scores = filter_.scores(among(model, probe, table, chosen, 4))
    assert torch.allclose(scores, expected, atol=1e-12)
    assert not torch.equal(scores, filter_.scores(among(model, probe, table, chosen, 5)))


@pytest.mark.parametrize("set_size", [None, 13, 400])
def test_a_pool_that_fits_is_one_set(
    model: FloatModel, probed: tuple[BatchNormProbe, Tensor, Tensor], set_size: int | None
) -> None:
    probe, table, _ = probed
    scores = BatchNormSensitivity(set_size=set_size).scores(among(model, probe, table, torch.arange(13)))
    assert torch.equal(scores, set_sensitivity(table, probe.norms))


def test_an_odd_number_of_images_never_leaves_one_alone(
    model: FloatModel, probed: tuple[BatchNormProbe, Tensor, Tensor]
) -> None:
    probe, table, _ = probed
    scores = BatchNormSensitivity(set_size=2, partitions=2).scores(among(model, probe, table, torch.arange(13)))
    assert scores.isfinite().all()


def test_a_bad_image_is_sensitive(model: FloatModel) -> None:
    images = small_images(40)
    probe = BatchNormProbe(model.module)
    table = scan(images, model, [probe]).tables[probe.name].clone()
    channels = table.shape[1] // 2
    # The set fits on the whole; image 7 alone is off in its mean.
    table[:, :channels] = 0
    table[:, channels:] = probe.norms.variance * probe.norms.values
    table[7, :channels] = 3 * probe.norms.values
    scores = set_sensitivity(table, probe.norms)
    assert scores.argmax() == 7 and scores[7] > 0 and (scores[:7] < 0).all()


def test_one_image_has_no_sensitivity(probed: tuple[BatchNormProbe, Tensor, Tensor]) -> None:
    probe, table, _ = probed
    with pytest.raises(DataError, match="1 is too few"):
        set_sensitivity(table[:1], probe.norms)


class Windows(nn.Module):
    """Batch norms that run twice, on windows of an image, on vectors, and not at all."""

    def __init__(self, order: str = "images first") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.twice = nn.BatchNorm2d(4)
        self.windows = nn.BatchNorm2d(4)
        self.vectors = nn.BatchNorm1d(4)
        self.unused = nn.BatchNorm2d(9)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.conv(x))
        x = self.twice(x * 0.5)
        if self.order == "images first":
            parts = x.unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1)  # [B * 2, C, H, W / 2]
            x = x + self.windows(parts).unflatten(0, (-1, 2)).mean((1, 2, 3, 4), keepdim=True).squeeze(1)
        else:
            x = x + self.windows(x[:1])
        return self.vectors(x.mean((2, 3)))


def windows_model(order: str = "images first") -> FloatModel:
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    module = Windows(order).eval()
    torch.random.set_rng_state(torch_state)
    preprocess = Preprocess(input_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    return FloatModel(module, preprocess, "windows", ModelSource(source="windows"))


def test_batch_norms_that_run_twice_on_windows_on_vectors_or_never() -> None:
    model = windows_model()
    probe = BatchNormProbe(model.module)
    images = small_images(6)
    table = scan(images, model, [probe], batch_size=4).tables[probe.name]
    assert probe.norms.names == ("twice", "windows", "vectors")
    assert probe.norms.values.tolist() == [2 * 256] * 4 + [256] * 4 + [1] * 4
    seen: dict[str, list[Tensor]] = {}
    layers = batch_norm_layers(model.module)
    hooks = [
        (layer, lambda layer, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad(), hooked(pre=hooks):
        model.module(model_inputs(images, model.preprocess))
    both = torch.cat([call.transpose(0, 1).flatten(1) for call in seen["twice"]], 1)
    assert torch.allclose(table[:, :4].sum(0), both.sum(1), rtol=1e-4, atol=1e-2)
    assert torch.allclose(table[:, 4:8].sum(0), seen["windows"][0].sum((0, 2, 3)), rtol=1e-4, atol=1e-2)
    assert torch.allclose(table[:, 8:12], seen["vectors"][0], rtol=1e-3, atol=1e-5)


def test_batch_norms_that_see_only_a_part_of_the_batch_are_refused() -> None:
    model = windows_model("one only")
    with pytest.raises(UnsupportedModelError, match="'windows' does not see the 6 images one after another"):
        scan(small_images(6), model, [BatchNormProbe(model.module)])


def test_what_is_not_known_is_said(model: FloatModel) -> None:
    probe = BatchNormProbe(model.module)
    with pytest.raises(UnsupportedModelError, match="no forward pass was watched yet"):
        _ = probe.norms
    with pytest.raises(UnsupportedModelError, match="none of the batch norms runs"), probe.watch(2):
        probe.rows(torch.zeros(2, 7))


def test_other_batch_norms_on_other_images_are_refused(model: FloatModel) -> None:
    probe = BatchNormProbe(model.module)
    with torch.no_grad():
        for size in (16, 24):
            with probe.watch(2):
                logits = model.module(torch.zeros(2, 3, size, size))
            if size == 24:
                with pytest.raises(UnsupportedModelError, match="other batch norms on other images"):
                    probe.rows(logits)
            else:
                probe.rows(logits)
