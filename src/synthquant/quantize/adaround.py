"""AdaRound: adaptive rounding for post-training quantization (arXiv:2004.10568)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from synthquant.core.progress import QUIET, Progress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.methods import QUANTIZERS, MemoryBudget, QuantReport
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import calibrate_activations
from synthquant.quantize.rounding import LearnedRounding, prepare, reconstruct


@QUANTIZERS.register("adaround")
class AdaRound(LearnedRounding):
    """AdaRound: adaptive rounding for post-training quantization (arXiv:2004.10568).

    Learns, layer by layer, whether each weight is rounded up or down. The layer reads what the weight-quantized network
    gives it and is fitted to what the float network puts out. Activations stay in floating point meanwhile; their
    ranges are set afterwards and not learned. Departures from the paper: the layer's activation function is not part of
    the layer; at fewer than 20,000 iterations rounding logits learn faster (`rounding_lr`); images end at black and
    white; a layer that got worse is put back.
    """

    granularity: Literal["block", "layer", "network"] = "layer"
    """What is fitted at a time: a block of the network, one layer, or the whole network."""

    def apply(
        self,
        quant_model: QuantModel,
        images: ImageSet,
        rng: Rng,
        *,
        progress: Progress = QUIET,
        workdir: Path | None = None,
        memory: MemoryBudget = MemoryBudget(),  # noqa: B008 (frozen)
    ) -> QuantReport:
        """Learn the roundings, then set activation ranges."""
        calibration = prepare(quant_model, images, self, quantized_weights=False)
        report = reconstruct(
            "adaround", quant_model, calibration, self, self.rounding_phase(), rng, progress, workdir, memory
        )
        calibrate_activations(quant_model, calibration, self.calibration_images, self.observer, quantized_weights=True)
        return report
