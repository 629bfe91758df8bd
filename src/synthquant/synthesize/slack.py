"""Slack distribution alignment of DSG: statistics need not be nearer to batch norms than those of noise mostly are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.synthesize.inversion import InvertedNetwork


class Slack(Settings):
    """How wide the gap between statistics of images and those that a batch norm remembers may be before it counts.

    Slack distribution alignment of DSG (arXiv:2103.01049): `max(|gap| - slack, 0)^2` in place of
    `gap^2`, with slacks of their own for means and for deviations. The slack is a percentile of the same gaps on
    Gaussian noise, measured through the network when images are begun and kept with them in the manifest. (The authors'
    code reads slacks from files that it does not bring.)
    """

    percentile: float = Field(default=0.9, ge=0, le=1)
    """Share of the gaps on noise that is within the slack; 1 is the widest gap, 0 nearly no slack."""

    per: Literal["layer", "channel"] = "layer"
    """Whether all channels of a layer share a slack, as in the paper, or each has its own."""

    samples: int = Field(default=1024, ge=1)
    """Images of noise. Where statistics are taken over a batch, whole batches, and so at least as many."""


def measure_slack(
    network: InvertedNetwork,
    settings: Slack,
    batch_size: int,
    shape: Sequence[int],
    rng: Rng,
    device: torch.device,
    progress: Progress = QUIET,
) -> list[dict[str, Any]]:
    """Measure the slack of a network, let it hold from now on, and return it as it is kept with the images.

    Args:
        network: whose gaps are measured, per image or per batch as its loss takes them.
        settings: how.
        batch_size: images over which statistics are taken in the loss.
        shape: of an image, `[C, H, W]`.
        rng: of the noise.
        device: where the network is.
        progress: told how far it is.

    Returns:
        For each layer in the order in which they run `layer`, and `mean` and `deviation`: a number, or one for each
        channel.
    """
    generator, gaps = rng.generator("noise"), []
    with progress.bar("slack", settings.samples) as bar:
        for begun in range(0, settings.samples, batch_size):
            size = min(batch_size, settings.samples - begun) if network.per_image else batch_size
            noise = torch.randn(size, *shape, generator=generator).to(device)
            found = network.gaps(noise).cpu()
            gaps.append(found if network.per_image else found[:, None])
            bar.advance(min(size, settings.samples - begun))
    of_layers = torch.split(torch.cat(gaps, 1), [channels for _, channels in network.layers], dim=2)
    slacks = [_percentile(of_layer, settings) for of_layer in of_layers]
    wide = [slack.expand(-1, of_layer.shape[2]) for slack, of_layer in zip(slacks, of_layers, strict=True)]
    network.slack = torch.cat(wide, 1).to(device)
    return [
        {"layer": name, "mean": slack[0].squeeze().tolist(), "deviation": slack[1].squeeze().tolist()}
        for (name, _), slack in zip(network.layers, slacks, strict=True)
    ]


def _percentile(gaps: Tensor, settings: Slack) -> Tensor:
    """Slack of a layer, `[2, 1]` or `[2, C]`, from its gaps `[2, N, C]`."""
    values = gaps.flatten(1)[..., None] if settings.per == "layer" else gaps
    # Numpy's: torch.quantile takes at most 16 million values.
    return torch.from_numpy(np.quantile(values.numpy(), settings.percentile, axis=1)).float()
