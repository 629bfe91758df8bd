"""How much smaller the error is on images that a network was quantized with than on others like them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.ranking import top_classes
from synthquant.data.image_set import ImageSet
from synthquant.evaluate.agreement import outputs_of_both
from synthquant.models.float_model import FloatModel
from synthquant.nn.quant_model import QuantModel

_MOST = 120.0
"""Ratio [dB] of outputs without an error that float32 can tell."""


@dataclass(frozen=True)
class Gap:
    """Mean signal-to-quantization-noise ratio of the outputs of single images, and agreement, on both sets."""

    count: int
    """Images that the network was quantized with, of those that were measured."""
    sqnr: float
    """Their ratio [dB]."""
    agreement: float | None
    """Share (0..1) of them with the float network's class; none: the network is no classifier."""
    held_out_count: int
    """Images that it was not quantized with."""
    held_out_sqnr: float
    held_out_agreement: float | None
    error: float
    """Standard error of the difference of the two ratios [dB]."""


def measure_gap(
    quant_model: QuantModel,
    images: ImageSet,
    held_out: ImageSet,
    *,
    float_model: FloatModel | None = None,
    count: int = 256,
    batch_size: int = 64,
) -> Gap:
    """Measure up to `count` images of each set.

    Args:
        quant_model: calibrated; left as it was.
        images: those that it was quantized with.
        held_out: others that were made or drawn in the same way.
        float_model: the float network, needed for a `quant_model` that was loaded from a checkpoint.
        count: how many of each set, evenly spaced.
        batch_size: images per pass.

    Raises:
        DataError: no image could be read.
        ModelError: `float_model` is missing.
        UnsupportedModelError: outputs are not of one image each, in their first dimension.
    """
    seen, same = _ratios(quant_model, images, float_model, count, batch_size)
    unseen, unseen_same = _ratios(quant_model, held_out, float_model, count, batch_size)
    return Gap(
        len(seen),
        float(seen.mean()),
        _share(same),
        len(unseen),
        float(unseen.mean()),
        _share(unseen_same),
        math.sqrt(sum(float(ratios.var(correction=0)) / max(len(ratios) - 1, 1) for ratios in (seen, unseen))),
    )


def _share(same: Tensor | None) -> float | None:
    return None if same is None else float(same.double().mean())


def _ratios(
    quant_model: QuantModel, images: ImageSet, float_model: FloatModel | None, count: int, batch_size: int
) -> tuple[Tensor, Tensor | None]:
    """The ratio [dB] of each image `[N]`, and of a classifier whether its class is the same, bool `[N]`."""
    ratios: list[Tensor] = []
    same: list[Tensor] = []
    for size, wanted, found in outputs_of_both(quant_model, images, float_model, count, batch_size):
        if any(not value.ndim or len(value) != size for value in wanted.values()):
            raise UnsupportedModelError(
                f"{quant_model.float_model.name}: outputs are not of one image each in their first dimension, so"
                " that images cannot be held out; leave held_out away"
            )
        pairs = [(value.double().flatten(1), found[name].double().flatten(1)) for name, value in wanted.items()]
        signal = torch.stack([value.square().sum(1) for value, _ in pairs]).sum(0)
        noise = torch.stack([(value - other).square().sum(1) for value, other in pairs]).sum(0)
        ratios.append((10 * torch.log10(signal / noise)).nan_to_num(_MOST).clamp(max=_MOST).cpu())
        if quant_model.float_model.task == "classify":
            (name,) = wanted
            same.append(top_classes(wanted[name]).eq(top_classes(found[name])).flatten().cpu())
    return torch.cat(ratios), torch.cat(same) if same else None
