"""Sample correlation inhibition of DSG: images of a batch are to be as little alike as samples of Gaussian noise."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from synthquant.core.settings import Settings

BROADENING = 1e-2
"""Distance of two eigenvalues (their mean is 1) below which the gradients of their eigenvectors stop growing."""
_LEAST_NORM = 1e-6
"""An image is divided by its norm, or by this where that is smaller."""


class Correlation(Settings):
    """Draws the correlations of a batch's images to those of as much Gaussian noise.

    Sample correlation inhibition of DSG (arXiv:2109.00212). Images are flattened and divided by their norms, so that
    their products make a Gram matrix `G` with ones on its diagonal; that of noise, drawn anew in each iteration, is
    `G*`. With eigenvalues in descending order, the loss over L batch norms is

        (eigenvalues * mean_k (w_k - w*_k)^2 + eigenvectors * sum_k share_k (1 - |<v_k, v*_k>|)) / L

    where `share_k` is `w*_k`, min-max normalised. Departures from the authors' code:

    - Weights. The code has 1e-4 and 1. At 1e-4 the eigenvalues change nothing: the Gram matrix of 48 images of the
      bundled ResNet-20 (200 iterations, no other part) has an effective rank of 26 with and without. It is 36 at a
      weight of 10 and 44 at 100 (noise: 48), with the distance to batch norms within what it varies by. And
      eigenvectors of fresh noise point anywhere, so that the mean of their term does not depend on the images: it adds
      nothing but noise to gradients, and is off by default.
    - The code takes the absolute value of the sum of signed products, which are arbitrary, and lowers it; here each
      product counts without its sign, and vectors are drawn to each other.
    """

    eigenvalues: float = Field(default=10.0, ge=0)
    """Weight of the eigenvalues' term (authors' code: 1e-4)."""

    eigenvectors: float = Field(default=0.0, ge=0)
    """Weight of the eigenvectors' term (authors' code: 1)."""


class SampleCorrelation:
    """The loss for one batch; to be called once in each iteration."""

    def __init__(self, settings: Correlation, layers: int, generator: torch.Generator) -> None:
        """Take how many batch norms there are, and the source of the noise, on the device of the images."""
        self._settings = settings
        self._layers = layers
        self._generator = generator

    def __call__(self, images: Tensor) -> Tensor:
        """Return the loss of normalised images `[B, C, H, W]`, a scalar; one image has none."""
        noise = torch.randn(images.shape, generator=self._generator, device=images.device)
        return correlation_loss(images, noise, self._settings) / self._layers


def correlation_loss(images: Tensor, noise: Tensor, settings: Correlation) -> Tensor:
    """Distance of the Gram spectrum of images `[B, ...]` to that of noise of the same shape; a scalar."""
    values, vectors = gram_spectrum(images)
    wanted, directions = gram_spectrum(noise)
    loss = settings.eigenvalues * (values - wanted).square().mean()
    if settings.eigenvectors:
        share = (wanted - wanted[-1]) / (wanted[0] - wanted[-1]).clamp_min(torch.finfo(wanted.dtype).eps)
        alike = (vectors * directions).sum(0).abs()
        loss = loss + settings.eigenvectors * (share * (1 - alike)).sum()
    return loss


def gram_spectrum(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[B]` in descending order and eigenvectors, columns of `[B, B]`, of a normalised Gram matrix.

    Its entries are the cosines between samples `[B, ...]`. Gradients are finite whatever the eigenvalues, also for
    equal samples: the factor `1 / d` of eigenvectors, with the distance `d` of two eigenvalues, is here
    `d / (d^2 + BROADENING^2)` (Lorentzian broadening, arXiv:1903.09650).
    """
    rows = F.normalize(samples.flatten(1).float(), dim=1, eps=_LEAST_NORM)
    values, vectors = _Eigen.apply(rows @ rows.T)
    return values.flip(0), vectors.flip(1)


class _Eigen(torch.autograd.Function):
    """`torch.linalg.eigh` of a symmetric matrix, ascending, with a gradient that equal eigenvalues do not break."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        return values, vectors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        of_values, of_vectors = gradients
        apart = values - values[:, None]
        inner = apart / (apart.square() + BROADENING**2) * (vectors.T @ of_vectors)
        gradient: Tensor = vectors @ (inner + torch.diag(of_values)) @ vectors.T
        return (gradient + gradient.T) / 2
