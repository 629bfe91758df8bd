"""The density that gradients pass through beside the filter's and the definition; heads compared pair by pair."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from tests.select.networks import SIZE, Tokens, float_model
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.models.attention import Attentions, patch_weights
from synthquant.models.patch_similarity import head_similarity, similarity_entropy

FORMS = ("fused", "manual", "einsum", "module")


def similarities() -> Tensor:
    """Three rows of float64: narrow, wide, and in two heaps."""
    generator = torch.Generator().manual_seed(0)
    narrow = torch.randn(900, generator=generator).double() * 0.02
    wide = torch.rand(900, generator=generator).double() * 2 - 1
    return torch.stack([narrow, wide, torch.cat([narrow[:450] - 0.7, narrow[450:] + 0.7])])


def definition(row: Tensor, points: int) -> Tensor:
    """Every value's Gaussian on every point of a grid whose ends have no gradient."""
    low, high = row.detach().aminmax()
    grid = torch.linspace(float(low), float(high), points, dtype=torch.float64)
    kernel = torch.exp(-0.5 * ((grid[:, None] - row[None]) / 0.01).square())
    density = kernel.mean(1) / (0.01 * math.sqrt(2 * math.pi)) + 1e-4
    return torch.trapezoid(-density * density.log(), grid)


def test_the_entropy_with_gradients_is_that_of_the_filter() -> None:
    rows = similarities().float()
    found = similarity_entropy(rows, interpolated=True)
    torch.testing.assert_close(found, similarity_entropy(rows), rtol=0, atol=0.01)
    assert found.tolist() == pytest.approx([float(definition(row.double(), 512)) for row in rows], abs=0.01)


def test_its_gradient_is_that_of_finite_differences_and_of_the_definition() -> None:
    rows = similarities().requires_grad_()
    (gradient,) = torch.autograd.grad(similarity_entropy(rows, interpolated=True).sum(), rows)
    step, moved = 1e-6, rows.detach().clone()
    for row in range(3):
        for place in (17, 200, 444, 801):
            ends = []
            for side in (step, -step):
                moved[row, place] += side
                ends.append(float(similarity_entropy(moved, interpolated=True)[row]))
                moved[row, place] -= side
            assert float(gradient[row, place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-7)
        own = rows[row].detach().requires_grad_()
        (wanted,) = torch.autograd.grad(definition(own, 512), own)
        assert float(F.cosine_similarity(gradient[row], wanted, 0)) > 0.99
        assert float(gradient[row].norm() / wanted.norm()) == pytest.approx(1, abs=0.03)


def test_rounding_to_the_grid_has_no_gradient() -> None:
    rows = similarities().requires_grad_()
    assert not similarity_entropy(rows).requires_grad


def compared(maps: Tensor) -> float:
    """SSIM of all pairs of heads `[heads, N, N]` of one window, averaged over pairs and rows."""
    values = []
    for row in range(maps.shape[1]):
        scaled = maps[:, row] / maps[:, row].mean()
        for one, other in combinations(scaled, 2):
            mean, mean_other, variance = one.mean(), other.mean(), one.var(correction=0) + other.var(correction=0)
            covariance = ((one - mean) * (other - mean_other)).mean()
            luminance = (2 * mean * mean_other + 1e-4) / (mean**2 + mean_other**2 + 1e-4)
            values.append(float(luminance * (2 * covariance + 9e-4) / (variance + 9e-4)))
    return sum(values) / len(values)


def attention_maps(images: int, heads: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(images, heads, tokens, tokens, generator=generator) * 2).softmax(-1)


def test_heads_are_compared_pair_by_pair_on_patches_alone() -> None:
    maps = attention_maps(2, 3, 17)
    found = head_similarity(maps, 2, (16, 16))
    assert found is not None
    assert found.tolist() == pytest.approx([compared(image[:, 1:, 1:]) for image in maps], rel=1e-4)
    alike = head_similarity(maps[:, :1].expand(-1, 3, -1, -1), 2, (16, 16))
    assert alike is not None and alike.tolist() == pytest.approx([1, 1])


def test_heads_are_compared_within_windows() -> None:
    maps = attention_maps(8, 2, 4)
    found = head_similarity(maps, 2, (16, 16))
    assert found is not None
    each = [compared(window) for window in maps]
    assert found.tolist() == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 4], rel=1e-4)


def test_one_head_and_attention_between_other_things_have_no_similarity() -> None:
    assert head_similarity(attention_maps(2, 1, 17), 2, (16, 16)) is None
    assert head_similarity(attention_maps(2, 3, 40), 2, (16, 16)) is None  # no grid of patches
    assert patch_weights(torch.rand(2, 3, 17, 9), 2, (16, 16)) is None  # of other tokens


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_handed_on_however_attention_is_written(form: str) -> None:
    model = float_model(Tokens(form), form)
    network, images, caught = model.module, model.example_images(2), list[Tensor]()
    assert isinstance(network, Tokens)
    with torch.no_grad():
        before = network(images)
        with Attentions(lambda _: None, caught.append):
            during = network(images)
        tokens = torch.cat([network.first.expand(2, -1, -1), network.embed(images).flatten(2).transpose(1, 2)], 1)
        joined = network.qkv(tokens)
        if form == "module":
            joined = F.linear(tokens, network.mixed.in_proj_weight, network.mixed.in_proj_bias)
        q, k, _ = joined.unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(before, during, rtol=1e-4, atol=1e-5)
    (found,) = caught
    torch.testing.assert_close(found, (q @ k.transpose(-2, -1) / 2).softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"need_weights": False}, {}, {"average_attn_weights": False}])
def test_torch_s_module_returns_the_weights_that_it_was_asked_for(options: dict[str, bool]) -> None:
    attention, x = nn.MultiheadAttention(6, 2, batch_first=True).eval(), torch.randn(2, SIZE, 6)
    with torch.no_grad():
        _, before = attention(x, x, x, **options)
        with Attentions(lambda _: None, lambda _: None):
            _, during = attention(x, x, x, **options)
    assert (before is None) == (during is None)
    if before is not None:
        torch.testing.assert_close(before, during)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_fused_weights_are_those_that_the_fused_product_used(mask: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4, generator=generator).unbind(0)
    keep = torch.rand(5, 5, generator=generator) > 0.3
    keep.fill_diagonal_(True)
    masks = {"none": None, "causal": None, "bool": keep, "float": torch.randn(5, 5, generator=generator)}
    caught: list[Tensor] = []
    with Attentions(lambda _: None, caught.append):
        output = F.scaled_dot_product_attention(q, k, v, masks[mask], is_causal=mask == "causal", scale=0.3)
    torch.testing.assert_close(caught[0] @ v, output)
