"""Entropy against its definition; attention found in every way it is written."""

from __future__ import annotations

import math

import pytest
import torch
from tests.select.networks import SIZE, Plain, Tokens, float_model
from tests.small_networks import small_images
from torch import Tensor
from torch.nn import functional as F

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import model_inputs
from synthquant.models.attention import patch_tokens
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.models.patch_similarity import similarity_entropy
from synthquant.select.patch_similarity import PatchProbe, PatchSimilarity
from synthquant.select.scan import scan
from synthquant.select.sequence import run_filters

FORMS = ("fused", "manual", "einsum", "module")


def slow_entropy(values: Tensor, points: int) -> float:
    """The definition in float64: every value's Gaussian on every point of the grid."""
    grid = torch.linspace(float(values.min()), float(values.max()), points, dtype=torch.float64)
    distance = (grid[:, None] - values.double()[None]) / 0.01
    density = torch.exp(-0.5 * distance.square()).mean(1) / (0.01 * math.sqrt(2 * math.pi)) + 1e-4
    return float(torch.trapezoid(-density * density.log(), grid))


def entropies(model: FloatModel, images: ImageSet) -> Tensor:
    probe = PatchProbe(model, 512)
    return scan(images, model, [probe], batch_size=4).tables[probe.name][:, 0]


def test_the_entropy_is_that_of_the_density() -> None:
    generator = torch.Generator().manual_seed(0)
    narrow = torch.randn(4000, generator=generator) * 0.02
    wide = torch.rand(4000, generator=generator) * 2 - 1
    two = torch.cat([narrow[:2000] - 0.7, narrow[2000:] + 0.7])
    rows = torch.stack([narrow, wide, two])
    for fast, row in zip(similarity_entropy(rows).tolist(), rows, strict=True):
        assert fast == pytest.approx(slow_entropy(row, 512), abs=0.02)
    assert similarity_entropy(rows, 128)[0] == pytest.approx(slow_entropy(narrow, 128), abs=0.02)


def test_values_on_the_grid_have_the_entropy_of_the_definition_itself() -> None:
    """Nothing is rounded here, so that every constant shows: bandwidth, floor of the density, halves at the ends."""
    grid = torch.linspace(-1, 1, 512)
    ends = grid[[0, -1, *range(200, 260)]]  # nearly all of the range is at the floor
    everywhere = grid.repeat(2)  # the density is high up to both ends
    for row in (ends, everywhere):
        assert float(similarity_entropy(row[None])) == pytest.approx(slow_entropy(row, 512), abs=1e-4)


def test_equal_patches_have_no_entropy() -> None:
    assert similarity_entropy(torch.ones(2, 50)).abs().max() < 1e-6


def test_what_is_not_finite_has_no_entropy_and_spoils_nothing_else() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = similarity_entropy(rows)
    rows[0, 7], rows[2, 0] = torch.nan, torch.inf
    found = similarity_entropy(rows)
    assert found.isnan().tolist() == [True, False, True] and found[1] == expected[1]


def test_what_is_diverse_has_more_entropy() -> None:
    values = torch.linspace(-1, 1, 500)
    wide, narrow = similarity_entropy(torch.stack([values, values * 0.1])).tolist()
    assert wide > narrow


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_found_however_it_is_written(form: str) -> None:
    model = float_model(Tokens(form), form)
    images = small_images(6)
    inputs = model_inputs(images, model.preprocess)
    with torch.no_grad():
        network = model.module
        tokens = network.embed(inputs).flatten(2).transpose(1, 2)
        tokens = torch.cat([network.first.expand(6, -1, -1), tokens], 1)
        if form == "module":
            joined = F.linear(tokens, network.mixed.in_proj_weight, network.mixed.in_proj_bias)
            q, k, v = joined.unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = network.qkv(tokens).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        outputs = ((q @ k.transpose(-2, -1) / 2).softmax(-1) @ v).mean(1)[:, 1:]  # heads averaged, class token dropped
        outputs = outputs / outputs.norm(dim=-1, keepdim=True)
        similarities = (outputs @ outputs.transpose(1, 2)).flatten(1)
    expected = [slow_entropy(row, 512) for row in similarities]
    found = entropies(model, images)
    assert found.tolist() == pytest.approx(expected, abs=0.02)
    assert found.std() > 0.02


def test_images_whose_patches_differ_most_stay() -> None:
    model, images = float_model(Tokens("fused"), "fused"), small_images(8)
    selection = run_filters([PatchSimilarity(keep=3)], images, model, Rng(0))
    assert selection.positions.tolist() == sorted(entropies(model, images).argsort()[-3:].tolist())


def test_attentions_of_a_pass_are_summed() -> None:
    model = float_model(Tokens("fused"), "fused")
    inputs = model_inputs(small_images(4), model.preprocess)

    def entropy(*passes: Tensor) -> Tensor:
        probe = PatchProbe(model, 128)
        with torch.no_grad(), probe.watch(4):
            for one in passes:
                logits = model.module(one)
        return probe.rows(logits)

    one, other = entropy(inputs), entropy(inputs * 0.5)
    assert float((one - other).abs().min()) > 1e-3
    torch.testing.assert_close(entropy(inputs, inputs * 0.5), one + other)


@pytest.mark.parametrize("form", FORMS)
def test_watching_changes_nothing_that_the_network_returns(form: str) -> None:
    model = float_model(Tokens(form), form)
    inputs = model.example_images(3)
    with torch.no_grad():
        before = model.module(inputs)
        with PatchProbe(model, 128).watch(3):
            during = model.module(inputs)
    assert torch.allclose(before, during, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "size", "patches"),
    [
        (16, (16, 16), 16),
        (17, (16, 16), 16),  # class token
        (197, (224, 224), 196),
        (198, (224, 224), 196),  # distilled
        (261, (224, 224), 256),  # class and four registers
        (50, (224, 224), 49),
        (99, (224, 448), 98),
        (577, (384, 384), 576),
        (65, (32, 32), 64),
        (50, (30, 30), 49),  # patches of 4 leave a rest
    ],
)
def test_tokens_before_the_patches_are_dropped(tokens: int, size: tuple[int, int], patches: int) -> None:
    output = torch.randn(2, 3, tokens, 4)
    found = patch_tokens(output, 2, size)
    assert found is not None
    assert torch.equal(found, output.mean(1)[:, tokens - patches :])


def test_windows_keep_all_their_tokens() -> None:
    found = patch_tokens(torch.randn(2 * 64, 3, 49, 4), 2, (224, 224))
    assert found is not None and found.shape == (128, 49, 4)
    apart = torch.randn(2, 64, 3, 49, 4)
    found, joined = patch_tokens(apart, 2, (224, 224)), patch_tokens(apart.flatten(0, 1), 2, (224, 224))
    assert found is not None and joined is not None and torch.equal(found, joined)


def test_one_head_needs_no_dimension() -> None:
    output = torch.randn(2, 17, 4)
    found = patch_tokens(output, 2, (16, 16))
    assert found is not None and torch.equal(found, output[:, 1:])


@pytest.mark.parametrize("channels", [32, 48, 96])
def test_attention_over_channels_is_not_taken_for_one_over_patches(channels: int) -> None:
    assert patch_tokens(torch.randn(2, 4, channels, 196), 2, (224, 224)) is None


@pytest.mark.parametrize("shape", [(2, 3, 1, 4), (3, 3, 16, 4), (4, 16, 4), (2, 3, 45, 4), (2, 4)])
def test_what_are_no_patches_is_not_taken_for_them(shape: tuple[int, ...]) -> None:
    # one token; no multiple of the images; heads unknown; 20 more than a grid of 16 pixels has; vectors
    assert patch_tokens(torch.randn(shape), 2, (16, 20)) is None


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"]
)
@pytest.mark.parametrize("fused", [True, False])
def test_networks_of_timm(name: str, fused: bool) -> None:
    pytest.importorskip("timm")
    size = 112 if "swin" in name else 32
    model = open_model(f"timm/{name}", pretrained=False, input_size=size)
    for part in model.module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    probe = PatchProbe(model, 128)
    with torch.no_grad(), probe.watch(2):
        logits = model.module(model.example_images(2))
    assert probe.rows(logits).shape == (2, 1) and probe.rows(logits).isfinite().all()


def test_a_vit_of_transformers_scores_the_same_in_both_of_its_forms() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, image_size=SIZE, patch_size=4
    )
    network = transformers.ViTForImageClassification(config)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inner(pixel_values=images).logits
            return logits

    model = float_model(Logits(), "vit")
    scores = []
    for form in ("sdpa", "eager"):
        network.set_attn_implementation(form)
        scores.append(entropies(model, small_images(5)))
    assert torch.allclose(scores[0], scores[1], atol=0.02)
    assert scores[0].std() > 0.02


def test_a_network_without_patches_is_refused_and_told_what_works() -> None:
    model = float_model(Plain(), "plain")
    with pytest.raises(UnsupportedModelError, match=r"plain has no attention between .* works for it: energy$"):
        PatchSimilarity().select(small_images(4), model, Rng(0))


def test_patches_that_do_not_show_are_an_error() -> None:
    model = float_model(Plain(), "plain")
    probe = PatchProbe(model, 128)
    with torch.no_grad(), probe.watch(2):
        logits = model.module(model.example_images(2))
    with pytest.raises(UnsupportedModelError, match="plain has no attention between"):
        probe.rows(logits)
