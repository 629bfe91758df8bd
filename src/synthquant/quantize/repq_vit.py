"""RepQ-ViT: scale reparameterization for post-training quantization of vision transformers (arXiv:2212.08254)."""

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
from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.reparameterize import reparameterization, require_layer_norms


@QUANTIZERS.register("repq_vit")
class RepqVit(Settings):
    """RepQ-ViT: scale reparameterization for post-training quantization of vision transformers (arXiv:2212.08254).

    What layer norms put out is calibrated for each channel, then layer norms and the layers behind them are changed so
    that one grid for the tensor does the same (`quantize.reparameterize` has the equations and departures). Weights are
    rounded to nearest then, and other ranges set in the network with rounded weights and float activations (theirs:
    activations in front are quantized too). The authors' softmax is `scheme.attention.softmax.kind=log_sqrt2`, which
    runtimes do not have; theirs is affine with 8 bits: `scheme.attention.softmax.num_bits=8`.
    """

    observer: str = "percentile"
    """How ranges are searched where the scheme does not say: `minmax`, `running`, `brecq`, `genie`, `qdrop` or
    `percentile`."""
    calibration_images: int = Field(default=32, ge=1)
    """Images from which ranges are set."""

    def check(self, quant_model: QuantModel) -> None:
        """Raise `UnsupportedModelError` if there is no layer norm before linear layers; says what there is."""
        require_layer_norms(quant_model)

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
        """Reparameterise, set ranges and round; draws nothing at random and keeps no files.

        Raises:
            UnsupportedModelError: there is no layer norm before linear layers; says what there is.
            ModelError: the network was loaded from a checkpoint.
        """
        calibration = CalibrationSet(quant_model, images)
        with progress.bar("calibrate", 3) as bar:
            found = reparameterization(quant_model, calibration, self.calibration_images, self.observer)
            quant_model.equalize(found.equalization)
            bar.advance(1)
            calibrate_weights(quant_model, self.observer)
            bar.advance(1)
            calibrate_activations(
                quant_model, calibration, self.calibration_images, self.observer, quantized_weights=True
            )
            for name, grids in found.grids.items():
                quantizer = quant_model.quantizers[name]
                assert isinstance(quantizer, AffineQuantizer)
                scale, zero_point = grids.mean_scale.float(), grids.mean_zero_point.float()
                quantizer.set_grid(scale.reshape(1), zero_point.reshape(1))
            bar.advance(1)
        progress.say(str(found.report))
        return QuantReport(method="repq_vit", reparameterization=found.report)
