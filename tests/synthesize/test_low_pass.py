"""The filter against its equation, and what is done at borders, ends and odd sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from synthquant.core.errors import RecipeError
from synthquant.recipe import SynthesizeSection
from synthquant.synthesize.low_pass import low_passed


def images(*shape: int) -> Tensor:
    return torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.3


@pytest.mark.parametrize("side", [7, 12])
def test_a_square_image_is_filtered_as_the_paper_writes_it(side: int) -> None:
    """The centred spectrum times exp(-D^2 / (2 D0^2)), D in bins."""
    pixels, cut_off = images(side, side), 0.3 * side
    bins = torch.arange(side) - side // 2
    gain = torch.exp(-(bins[:, None] ** 2 + bins**2) / (2 * cut_off**2))
    centred = torch.fft.fftshift(torch.fft.fft2(pixels.double()), dim=(2, 3)) * gain
    expected = torch.fft.ifft2(torch.fft.ifftshift(centred, dim=(2, 3))).real.float()
    torch.testing.assert_close(low_passed(pixels, 0.3), expected, rtol=0, atol=1e-5)


def test_what_is_even_passes_and_the_finest_pattern_is_damped_most() -> None:
    even = torch.full((1, 3, 8, 8), 0.25)
    torch.testing.assert_close(low_passed(even, 0.05), even)
    stripes = 0.5 + 0.4 * (-1.0) ** torch.arange(8).expand(1, 1, 8, 8)
    expected = 0.5 + (stripes - 0.5) * math.exp(-(0.5**2) / (2 * 0.36**2))
    torch.testing.assert_close(low_passed(stripes, 0.36), expected)


def test_an_image_that_is_not_square_is_blurred_alike_along_both_axes() -> None:
    dot = torch.full((1, 1, 16, 40), 0.2)
    dot[..., 8, 20] = 0.9
    blurred = low_passed(dot, 0.3)[0, 0]
    assert float(blurred[8, 20]) < 0.8
    torch.testing.assert_close(blurred[5:12, 20], blurred[8, 17:24], rtol=0, atol=2e-3)


def test_what_goes_beyond_black_and_white_is_cut_off_after_the_filter() -> None:
    pixels = images(8, 8) * 4 - 1.5
    found = low_passed(pixels, 5.0)
    assert float(found.min()) == 0 and float(found.max()) == 1
    torch.testing.assert_close(found, low_passed(pixels, 1e9), rtol=0, atol=0.02)


def test_images_keep_their_type_and_without_a_cut_off_their_bits() -> None:
    whole = (images(8, 8) * 255).to(torch.uint8)
    found = low_passed(whole, 0.36)
    assert found.dtype == torch.uint8
    assert int((found.float() - low_passed(whole / 255, 0.36) * 255).abs().max()) <= 1
    assert low_passed(whole, None) is whole
    assert low_passed(images(8, 8).half(), 0.36).dtype == torch.float16


@pytest.mark.parametrize("tiny", [5e-324, 1e-200])
def test_the_smallest_cut_off_leaves_the_mean_colour(tiny: float) -> None:
    pixels = images(8, 8)
    torch.testing.assert_close(low_passed(pixels, tiny), pixels.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8))


@pytest.mark.parametrize("value", [0, -0.36, "wide", float("nan"), True])
def test_a_bad_cut_off_is_one_line(value: object) -> None:
    with pytest.raises(RecipeError, match=r"^recipe: images: low_pass = .*") as error:
        SynthesizeSection.parse({"method": "noise", "low_pass": value}, "recipe")
    assert "\n" not in str(error.value)
