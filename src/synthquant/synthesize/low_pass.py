"""A low-pass filter for finished images: a setting of every method, applied once before images are stored."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from synthquant.core.settings import Settings, is_unset


class LowPass(Settings):
    """What every synthesis method can be told about its finished images."""

    low_pass: float | None = Field(default=None, gt=0, exclude_if=is_unset)
    """Cut-off `D0 / side` of a Gaussian low-pass filter over each finished image, as a share of its side, for example
    0.36; none: no filter (SynQ, ICLR 2025, which uses `D0` = 80 at 224 pixels)."""


def low_passed(pixels: Tensor, low_pass: float | None) -> Tensor:
    """Return images `[N, C, H, W]` in pixel space (uint8 or floats) without their high frequencies; the same type.

    The two-dimensional spectrum is multiplied by `exp(-D^2 / (2 D0^2))` (SynQ, ICLR 2025), with `D` the
    distance from frequency zero, where the gain is 1, in bins, and `D0` the share `low_pass` of the image's side.
    `D / side` is a frequency in cycles per pixel, and that is what both axes of an image that is not square are
    measured in: the filter is as wide in pixels along one as along the other. Borders wrap around. What the filter
    leaves beyond black and white is cut off. Without `low_pass` images stay as they are.
    """
    if low_pass is None:
        return pixels
    height, width = pixels.shape[-2:]
    # Float64, so that no cut-off is too small or too large for it.
    rows = (torch.fft.fftfreq(height, dtype=torch.float64, device=pixels.device) / low_pass).square()
    columns = (torch.fft.rfftfreq(width, dtype=torch.float64, device=pixels.device) / low_pass).square()
    gain = torch.exp(-(rows[:, None] + columns) / 2).float()
    levels = 255 if pixels.dtype == torch.uint8 else 1
    spectrum = torch.fft.rfft2(pixels.float() / levels) * gain
    filtered: Tensor = torch.fft.irfft2(spectrum, s=(height, width)).clamp(0, 1) * levels
    return (filtered.round() if pixels.dtype == torch.uint8 else filtered).to(pixels.dtype)
