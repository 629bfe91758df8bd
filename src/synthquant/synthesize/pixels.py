"""Optimising the pixels of a batch themselves, as ZeroQ and DSG do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synthquant.synthesize.inversion import Advice, InvertedNetwork, Learner, Objective, PlateauSchedule, adam, invert
from synthquant.synthesize.pieces import Need

if TYPE_CHECKING:
    from synthquant.synthesize.batches import Batch


def optimized_pixels(
    network: InvertedNetwork,
    start: Tensor,
    batch: Batch,
    device: torch.device,
    objective: Objective,
    *,
    iterations: int,
    pixel_lr: float,
    patience: int,
) -> Tensor:
    """Return normalised images `[B, C, H, W]` after Adam on their pixels, whose rate falls on plateaus.

    Args:
        network: what is inverted.
        start: the images to begin with, on the CPU.
        batch: whose randomness and bar are used.
        device: where the network is.
        objective: what is minimised beside the distance of statistics.
        iterations: steps.
        pixel_lr: the rate to begin with.
        patience: iterations without progress after which it falls.
    """
    pixels = start.to(device, memory_format=torch.channels_last).requires_grad_()
    optimizer, rate = adam([pixels], pixel_lr)
    return invert(
        network,
        lambda: pixels,
        [Learner(optimizer, PlateauSchedule(rate, patience=patience))],
        iterations=iterations,
        swing_generator=batch.rng.generator("swing", device),
        advice=Advice(batch.index, f"pixel_lr (now {pixel_lr:g})"),
        bar=batch.bar,
        objective=objective,
    )


def need_of_pixels(shape: Sequence[int]) -> Need:
    """Memory of pixels, their gradients and Adam's two moments, for images `[C, H, W]`."""
    return Need(0, 4 * math.prod(shape) * 4)
