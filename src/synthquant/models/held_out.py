"""Samples held out of training, by which a state of a network is chosen: never by those that it is measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.ranking import top_classes
from synthquant.core.rng import Rng


@dataclass(frozen=True)
class HeldOut:
    """Positions of samples, each in one of two parts, in ascending order."""

    training: Tensor
    """int64, those to train on."""
    held_out: Tensor
    """int64, those to choose by."""


def hold_out(count: int, share: float, rng: Rng) -> HeldOut:
    """Hold a random share (0..1, at least one sample, not all) of `count` samples out of training.

    Raises `DataError` if there are fewer than two samples.
    """
    if count < 2:
        raise DataError(f"{count} samples are too few to hold some of them out of training; give at least 2")
    order = torch.randperm(count, generator=rng.generator("held out"))
    held = min(max(1, round(share * count)), count - 1)
    return HeldOut(order[held:].sort().values, order[:held].sort().values)


def agreement(reference: Tensor, logits: Tensor) -> float:
    """Share (0..1) of samples to which both networks, logits `[N, classes]` each, give the same class."""
    return float((top_classes(reference) == top_classes(logits)).double().mean())
