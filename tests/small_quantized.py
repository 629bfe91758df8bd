"""Quantized denoisers of small pipelines, calibrated on what their samplers gave them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from tests.small_diffusion import NOISE

from synthquant.core.files import sha256_bytes
from synthquant.core.rng import Rng
from synthquant.diffusion.denoiser import Denoiser
from synthquant.diffusion.pipelines import Sampling
from synthquant.models.open import open_model
from synthquant.models.signature import Inputs, joined
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.rtn import Rtn

STEPS = 3


def tiny() -> diffusers.DDIMPipeline:
    """The least that samples: one level, and an attention in the middle; images of 8x8 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            attention_head_dim=8,
        ).eval()
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(**NOISE))


class Recorded:
    """What a sampler gave a denoiser at all of its steps."""

    def __init__(self, model: Denoiser, conditions: Any, images: int = 2) -> None:
        found = model.pipeline.record(conditions, list(range(images)), Sampling(steps=STEPS), range(STEPS))
        self._rows = joined(list(found.values()))

    @property
    def fingerprint(self) -> str:
        return sha256_bytes(b"recorded")

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Inputs]:
        chosen = list(range(len(self))) if indices is None else list(indices)
        for start in range(0, len(chosen), size):
            rows = [self._rows.rows(row, row + 1) for row in chosen[start : start + size]]
            yield rows[0] if len(rows) == 1 else joined(rows)


def quantized(folder: Path, conditions: Any = None, scheme: str = "W8A8") -> tuple[QuantModel, Recorded]:
    """The quantized denoiser of a pipeline's folder, and what it was calibrated on."""
    model = open_model(f"diffusers/{folder}")
    assert isinstance(model, Denoiser)
    recorded = Recorded(model, conditions)
    quant_model = QuantModel.build(model, scheme)
    Rtn().apply(quant_model, recorded, Rng(0))
    return quant_model, recorded
