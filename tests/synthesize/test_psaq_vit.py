"""PSAQ-ViT against its paper, step by step in plain PyTorch; images that do not know how many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.select.networks import CLASSES, SIZE, Plain, Tokens, float_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from synthquant import make
from synthquant.core.errors import RecipeError, UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess, model_inputs
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.patch_similarity import head_similarity, similarity_entropy
from synthquant.recipe import SynthesizeSection
from synthquant.synthesize import pieces, psaq_vit
from synthquant.synthesize.attentive import AttentiveNetwork
from synthquant.synthesize.inversion import Learner, WarmedCosineSchedule
from synthquant.synthesize.priors import total_variations
from synthquant.synthesize.psaq_vit import PsaqVit, moved

# Larger steps soon lead elsewhere from a difference in the last bit.
SMALL_STEPS = partial(PsaqVit, iterations=3, pixel_lr=0.01)


def vit(size: int = SIZE, prefix: int = 1) -> FloatModel:
    return float_model(Tokens("manual", prefix), "vit", size)


def watched(model: FloatModel, **options: Any) -> AttentiveNetwork:
    return AttentiveNetwork(model, method="psaq_vit", **({"logits": True, "heads": False} | options))


def pixels(images: ImageSet) -> Tensor:
    return torch.stack([images[index].image for index in range(len(images))])


def off(one: ImageSet, other: ImageSet) -> float:
    return float((pixels(one).float() - pixels(other).float()).abs().mean())


def output_and_weights(network: Tokens, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = network.embed(images).flatten(2).transpose(1, 2)
    tokens = torch.cat([network.first.expand(len(tokens), -1, -1), tokens], 1)
    q, k, v = network.qkv(tokens).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    return weights @ v, weights


@pytest.mark.parametrize("heads", [0.0, 3.0])
def test_follows_the_paper_step_by_step(heads: float) -> None:
    """Two stages with PyTorch's own Adam, roll and flip, one image after the other, from the same draws.

    Steps are as small as those of `SMALL_STEPS`.
    """
    model = vit()
    network = model.module
    assert isinstance(network, Tokens)
    method = PsaqVit(batch_size=2, iterations=5, pixel_lr=0.01, jitter=(0.1, 0.3), head_similarity=heads)
    found = model_inputs(method.synthesize(model, 2, Rng(5)), model.preprocess)
    labels = method.synthesize(model, 2, Rng(5)).labels
    assert labels is not None
    low, high = model.preprocess.limits
    for index in range(2):
        drawn = method.drawn(Rng(5).child(f"image-{index}"), model, CLASSES)
        assert int(labels[index]) == int(drawn.label)
        image = drawn.pixels[None].clone().requires_grad_()
        optimizer = torch.optim.Adam([image], lr=0.01, betas=(0.5, 0.9))
        for step in range(10):
            place = step % 5
            rate = 0.01 if place == 0 else 0.005 * (1 + math.cos(math.pi * (place - 1) / 4))
            optimizer.param_groups[0]["lr"] = rate
            offset = int(drawn.offsets[step])
            shown = image.roll((offset, offset), (2, 3))
            shown = shown.flip(3) if drawn.flips[step] else shown
            output, weights = output_and_weights(network, shown)
            patches = output.mean(1)[:, 1:]
            patches = patches / patches.norm(dim=-1, keepdim=True)
            entropy = similarity_entropy((patches @ patches.transpose(1, 2)).flatten(1), interpolated=True)
            differences = (
                shown[..., 1:] - shown[..., :-1],
                shown[..., 1:, :] - shown[..., :-1, :],
                shown[..., 1:, 1:] - shown[..., :-1, :-1],
                shown[..., 1:, :-1] - shown[..., :-1, 1:],
            )
            rough = sum(difference.norm() for difference in differences)
            loss = F.cross_entropy(network(shown), drawn.label[None]) - entropy
            loss = loss + 0.05 * math.sqrt(32) * (rough - drawn.tau).abs()
            similarity = head_similarity(weights, 1, (SIZE, SIZE))
            assert similarity is not None
            loss = loss - heads * similarity
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            with torch.no_grad():
                image.clamp_(low, high)
        start = model.preprocess.cut_off(drawn.pixels)
        assert float((found[index] - start).abs().mean()) > 0.02
        assert float((found[index] - image[0].detach()).abs().mean()) < 0.003


def test_entropy_alone_makes_patches_diverse() -> None:
    model = vit()
    method = PsaqVit(batch_size=4, iterations=60, pixel_lr=0.05, jitter=(0.0,), cross_entropy=0, total_variation=0)
    made = model_inputs(method.synthesize(model, 4, Rng(0)), model.preprocess)
    start = torch.stack([method.drawn(Rng(0).child(f"image-{index}"), model, 0).pixels for index in range(4)])
    with torch.no_grad():
        before, after = (watched(model)(images).entropies for images in (model.preprocess.cut_off(start), made))
    assert float((after - before).mean()) > 0.1


def test_similar_heads_are_a_term_of_their_own() -> None:
    model = vit()
    plain, alike = (
        PsaqVit(batch_size=4, iterations=60, pixel_lr=0.05, jitter=(0.0,), head_similarity=weight)
        for weight in (0.0, 20.0)
    )
    found = []
    for method in (plain, alike):
        images = model_inputs(method.synthesize(model, 4, Rng(0)), model.preprocess)
        with torch.no_grad():
            similarities = watched(model, heads=True)(images).similarities
        assert similarities is not None
        found.append(float(similarities.mean()))
    assert found[1] > found[0] + 0.1


def test_an_image_does_not_know_how_many_there_are() -> None:
    model = vit()
    alone, together = (SMALL_STEPS(batch_size=size).synthesize(model, 4, Rng(0)) for size in (1, 4))
    assert off(alone, together) < 1e-3
    assert alone.labels is not None and together.labels is not None and torch.equal(alone.labels, together.labels)
    network, images, method = watched(model, heads=True), model.example_images(4), PsaqVit(head_similarity=1)
    labels, taus = torch.arange(4), torch.linspace(20, 40, 4)
    with torch.no_grad():
        whole = method.losses(network, images, labels, taus)
        each = [method.losses(network, images[i : i + 1], labels[i : i + 1], taus[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(each), whole)
    assert whole.std() > 0.1


def test_pieces_of_a_batch_make_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = vit(), SMALL_STEPS(batch_size=5)
    whole, sizes = method.synthesize(model, 5, Rng(0)), list[int]()
    per_image = watched(model).need().per_image
    monkeypatch.setattr(pieces, "_WHOLE", {"cpu": 4 * per_image})
    monkeypatch.setattr(pieces, "_PIECE", {"cpu": 2 * per_image})
    losses = PsaqVit.losses

    def counted(self: PsaqVit, network: AttentiveNetwork, images: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(len(images))
        return losses(self, network, images, *rest)

    monkeypatch.setattr(PsaqVit, "losses", counted)
    assert off(method.synthesize(model, 5, Rng(0)), whole) < 1e-3
    assert sizes == [2, 2, 1] * 6


@pytest.mark.parametrize(("size", "most"), [(16, (1, 2)), (224, (15, 30))])
def test_images_are_rolled_by_shares_of_their_side(size: int, most: tuple[int, int]) -> None:
    method = PsaqVit(iterations=2000)
    offsets = method.drawn(Rng(0), vit(size), CLASSES).offsets.view(2, -1)
    assert (-offsets.amin(1)).tolist() == offsets.amax(1).tolist() == list(most)


def test_rolling_and_mirroring_are_torch_s() -> None:
    images = torch.randn(3, 2, 5, 7)
    found = moved(images, torch.tensor([3, -2, 0]), torch.tensor([True, False, True]))
    expected = [images[0].roll((3, 3), (1, 2)).flip(2), images[1].roll((-2, -2), (1, 2)), images[2].flip(2)]
    assert torch.equal(found, torch.stack(expected))


def test_targets_of_the_total_variation_are_those_of_the_authors() -> None:
    model = vit(224)
    taus = torch.stack([PsaqVit(iterations=1).drawn(Rng(seed), model, CLASSES).tau for seed in range(200)])
    batch = math.sqrt(32) * taus  # 32 images alike, as the norm over a batch counts them
    assert 2490 < float(batch.min()) < 2520 and 2980 < float(batch.max()) < 3010
    rough = total_variations(torch.randn(1, 3, 9, 9))
    images = torch.randn(1, 3, 9, 9).expand(32, -1, -1, -1)
    assert float(total_variations(images)[0]) == pytest.approx(float(total_variations(images[:1])[0]))
    assert rough.shape == (1,)


def test_total_variation_is_drawn_to_its_target_from_both_sides() -> None:
    model, images = vit(), vit().example_images(2)
    rough, labels = total_variations(images), torch.zeros(2, dtype=torch.int64)
    network = watched(model)
    with torch.no_grad():
        met, smoother, rougher = (
            PsaqVit(total_variation=0.5).losses(network, images, labels, rough + distance) for distance in (0, 4, -6)
        )
    torch.testing.assert_close(smoother - met, torch.full((2,), 2.0))
    torch.testing.assert_close(rougher - met, torch.full((2,), 3.0))


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a number off the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func) and "nonzero" not in str(func), func
        return func(*args, **(kwargs or {}))


def test_nothing_in_a_step_waits_for_the_device() -> None:
    model, method = vit(), PsaqVit(head_similarity=1)
    network, pixels = watched(model, heads=True), model.example_images(3).requires_grad_()
    offsets, flips, labels = torch.tensor([1, 0, -2]), torch.tensor([True, False, True]), torch.arange(3)
    with NoWaiting():
        images = moved(pixels, offsets, flips)
        torch.autograd.backward(method.losses(network, images, labels, torch.ones(3)).sum())
        model.preprocess.cut_off(pixels.detach())
    assert pixels.grad is not None and bool(pixels.grad.any())


def test_the_rate_rises_and_falls_in_each_stage() -> None:
    rate = torch.tensor(0.0)
    schedule = WarmedCosineSchedule(rate, peak=2.0, warm_up=2, period=6)
    rates = [float(rate)]
    for iteration in range(1, 12):
        schedule.step(torch.zeros(()), iteration)
        rates.append(float(rate))
    stage = [1.0, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    assert rates == pytest.approx(stage * 2)


def test_defaults_are_those_of_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    method = PsaqVit()
    assert (method.batch_size, method.iterations, method.pixel_lr, method.cross_entropy) == (32, 500, 0.2, 1)
    assert method.total_variation == pytest.approx(0.05 * math.sqrt(32), abs=1e-3)
    assert method.jitter == pytest.approx((15 / 224, 30 / 224), abs=2e-3)
    assert method.head_similarity == 0, "belongs to MimiQ"
    asked: dict[str, Any] = {}

    def minimize(backward: object, learners: Sequence[Learner], **options: Any) -> None:
        (learner,) = learners
        asked.update(options, **vars(learner.schedule), betas=learner.optimizer.param_groups[0]["betas"])
        assert learner.optimizer.param_groups[0]["lr"] is asked["rate"]

    monkeypatch.setattr(psaq_vit, "minimize", minimize)
    method.synthesize(vit(), 1, Rng(0))
    assert (asked["iterations"], asked["betas"]) == (1000, (0.5, 0.9))
    assert (asked["peak"], asked["warm_up"], asked["period"]) == (0.2, 100, 500)


class Windows(nn.Module):
    """Patches of 4x4, attention within windows of 2x2 of them, as in Swin; no token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, CLASSES)

    def attend(self, images: Tensor) -> Tensor:
        """`[B * windows, heads, 4, d]`."""
        x = self.embed(images).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, images: Tensor) -> Tensor:
        out = self.attend(images).transpose(1, 2).flatten(2)
        return self.head(out.reshape(len(images), -1, 8).mean(1))


def test_all_patches_of_all_windows_of_an_image_are_one_row() -> None:
    model = float_model(Windows(), "windows")
    network, images = model.module, model.example_images(3)
    assert isinstance(network, Windows)
    with torch.no_grad():
        patches = F.normalize(network.attend(images).mean(1), dim=-1)
        rows = (patches @ patches.transpose(1, 2)).reshape(3, 4 * 4 * 4)
        torch.testing.assert_close(watched(model)(images).entropies, similarity_entropy(rows, interpolated=True))
    assert len(PsaqVit(batch_size=3, iterations=1).synthesize(model, 3, Rng(0))) == 3


def test_a_network_that_is_no_classifier_has_images_without_labels() -> None:
    preprocess = Preprocess(input_size=(SIZE, 2 * SIZE), mean=(0.5,) * 3, std=(0.25,) * 3)
    model = FloatModel(vit().module, preprocess, "features", ModelSource(source="features", task="other"), "other")
    images = PsaqVit(batch_size=2, iterations=1, cross_entropy=0).synthesize(model, 2, Rng(0))
    assert images.labels is None and pixels(images).shape == (2, 3, SIZE, 2 * SIZE)
    with pytest.raises(UnsupportedModelError, match=r"features is no classifier.* leave them out"):
        PsaqVit().synthesize(model, 2, Rng(0))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (float_model(Plain(), "plain"), {}, r"plain has no attention between .* use a method that does not: .*noise"),
        (vit(18), {}, "patches of vit do not divide its images of 18x18 pixels: the last 2 rows and 2 columns"),
        (vit(), {"jitter": [0.1, 1]}, r"jitter.*: a share of a side is at least 0 and below 1"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_anything_is_written(
    model: FloatModel, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((UnsupportedModelError, RecipeError), match=message):
        section = SynthesizeSection.parse({"method": "psaq_vit", "count": 2} | settings, "here")
        make.synthesize(model, section, 0, tmp_path / "deep" / "images")
    assert not (tmp_path / "deep").exists()


def test_heads_are_compared_only_where_there_are_several() -> None:
    class OneHead(Windows):
        def attend(self, images: Tensor) -> Tensor:
            x = self.embed(images).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).unflatten(2, (3, 8)).permute(2, 0, 1, 3)[:, :, None]
            return F.scaled_dot_product_attention(q, k, v)

    model = float_model(OneHead(), "one")
    assert len(PsaqVit(iterations=1).synthesize(model, 1, Rng(0))) == 1
    with pytest.raises(UnsupportedModelError, match="one has no attention of several heads"):
        PsaqVit(iterations=1, head_similarity=1).synthesize(model, 1, Rng(0))
