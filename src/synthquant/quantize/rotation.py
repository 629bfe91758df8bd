"""Rotation by Hadamard matrices, with ranges measured at run time: a baseline without calibration."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from synthquant.core.progress import QUIET, Progress
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.methods import QUANTIZERS, MemoryBudget
from synthquant.models.samples import Samples
from synthquant.nn.input_schemes import RotationScheme
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_weights


@QUANTIZERS.register("rotation")
class Rotation(Settings):
    """Rotated input channels, rounding to nearest, and ranges at run time (ConvRot, arXiv:2512.03673); no images.

    Each layer rotates blocks of its input channels by a regular Hadamard matrix, and its weight alike, so that no
    channel stands out in what shares one scale. Activations are symmetric, with a scale for each token where a layer is
    linear or a 1x1 convolution, as in the row-wise int8 form that users of image generation run, and for each sample
    in larger kernels, which have none for tokens; factors of attention with one for each sample, at 8 bits or more.
    Weights are as the scheme says: give them `strategy: channel`.

    The authors rotate linear layers of transformers only, at 4 bits, and pad channels to whole blocks; here a block is
    the largest power of 4 that divides the channels, and convolutions are rotated too.
    """

    needs_images: ClassVar[bool] = False

    block: int = Field(default=256, ge=4)
    """Most channels that are rotated together."""
    observer: str = "minmax"
    """How ranges of weights are searched: `minmax`, `brecq`, `genie`, `qdrop` or `percentile`."""

    def apply(
        self,
        quant_model: QuantModel,
        images: ImageSet | Samples | None,
        rng: Rng,
        *,
        progress: Progress = QUIET,
        workdir: Path | None = None,
        memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
    ) -> QuantReport:
        """Rebuild the network with rotated layers and round; reads no images and draws nothing at random.

        Raises:
            DataError: there is a set of images and it is empty.
            SchemeError: the scheme is one for integer runtimes (`deploy: full`) or modulated.
            ModelError: the network was loaded from a checkpoint.
        """
        if images is not None:
            CalibrationSet(quant_model, images)
        quant_model.rebuild(quant_model.scheme.with_rotation(RotationScheme(block=self.block)))
        with progress.bar("rotation", 1) as bar:
            calibrate_weights(quant_model, self.observer)
            bar.advance(1)
        return QuantReport(method="rotation")
