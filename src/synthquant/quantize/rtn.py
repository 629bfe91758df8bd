"""Rounding to nearest, the baseline."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from synthquant.core.progress import QUIET, Progress
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.methods import QUANTIZERS, MemoryBudget
from synthquant.models.samples import Samples
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights


@QUANTIZERS.register("rtn")
class Rtn(Settings):
    """Rounding to nearest with calibrated ranges: what every learned method is compared with.

    Ranges are searched by Genie-M's observer, those of activations in the network with rounded weights and float
    activations, before anything is learned. They are not quite those of the other methods, each of which sets them when
    and on as many images as its authors do: Genie-M on 32, anew at each unit, BRECQ on 64, QDrop on 256.
    """

    observer: str = "genie"
    """How ranges are searched: `minmax`, `running`, `brecq`, `genie`, `qdrop` or `percentile`."""
    calibration_images: int = Field(default=256, ge=1)
    """Images from which activation ranges are set."""

    def apply(
        self,
        quant_model: QuantModel,
        images: ImageSet | Samples,
        rng: Rng,
        *,
        progress: Progress = QUIET,
        workdir: Path | None = None,
        memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
    ) -> QuantReport:
        """Set ranges and round; draws nothing at random and keeps no files."""
        calibration = CalibrationSet(quant_model, images)
        with progress.bar("calibrate", 2) as bar:
            calibrate_weights(quant_model, self.observer)
            bar.advance(1)
            calibrate_activations(
                quant_model, calibration, self.calibration_images, self.observer, quantized_weights=True
            )
            bar.advance(1)
        return QuantReport(method="rtn")
