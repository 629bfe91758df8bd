"""Gaussian noise: the simplest data that has nothing to do with the training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from synthquant.core.progress import QUIET, Progress
from synthquant.methods import SYNTHESIZERS
from synthquant.synthesize.batches import Batch, Order, batch_sizes, make_batches
from synthquant.synthesize.low_pass import LowPass

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel


@SYNTHESIZERS.register("noise")
class Noise(LowPass):
    """Gaussian noise, the data-free baseline of ZeroQ (arXiv:2001.00281).

    Pixels are N(0, 1) after normalisation, so they have the training data's mean and deviation and nothing else of it.
    """

    needs_batch_norm: ClassVar[bool] = False

    batch_size: int = Field(default=128, ge=1)
    """Images drawn at a time; also the number of images in one part on disk."""

    def synthesize(
        self,
        model: FloatModel,
        count: int,
        rng: Rng,
        *,
        writer: ImageSetWriter | None = None,
        progress: Progress = QUIET,
    ) -> ImageSet:
        """Draw exactly `count` images of the model's input size. Raises `InputError` if `count` is not positive."""
        sizes = batch_sizes(count, self.batch_size)
        shape = (model.preprocess.channels, *model.preprocess.input_size)

        def draw(batch: Batch) -> Tensor:
            batch.bar.advance(batch.size)
            return torch.randn(batch.size, *shape, generator=batch.rng.generator("pixels"))

        return make_batches("noise", self, Order(model, rng, writer, progress), sizes, draw)
