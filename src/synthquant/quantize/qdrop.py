"""QDrop: randomly dropping quantization for extremely low-bit post-training quantization (arXiv:2203.05740)."""

from __future__ import annotations

import operator
from dataclasses import replace

from pydantic import Field

from synthquant.methods import QUANTIZERS
from synthquant.quantize.learn import Phase
from synthquant.quantize.network_errors import NetworkErrors


@QUANTIZERS.register("qdrop")
class QDrop(NetworkErrors):
    """QDrop: randomly dropping quantization for extremely low-bit post-training quantization (arXiv:2203.05740).

    Roundings and activation step sizes of a block are learned together. Each element of what the block reads is the
    quantized network's or the float network's, and each activation inside is quantized or not, at random. Departures
    from the authors' code: activations are quantized where layers read them instead of behind the activation function;
    the image has 8 bits (theirs: none) and ends at black and white; zero points of more than 5 bits follow the range
    instead of being searched; at fewer than 20,000 iterations rounding logits learn faster (`rounding_lr`); a unit that
    got worse is put back.
    """

    observer: str = "qdrop"
    """How ranges are searched where the scheme does not say: `minmax`, `running`, `brecq`, `genie`, `qdrop` or
    `percentile`."""
    calibration_images: int = Field(default=256, ge=1)
    """Images from which activation ranges are set, in the float network."""
    activation_lr: float = Field(default=4e-5, gt=0)
    """Adam learning rate of activation step sizes, cosine to 0."""
    quantize_probability: float = Field(default=0.5, gt=0, le=1)
    """Probability that a value is the quantized one (the authors' `drop_prob`)."""
    calibrate_units: bool = Field(default=False, exclude_if=operator.not_)
    """Set activation ranges anew at each unit, from `calibration_images` in the network quantized so far, as Genie-M
    does: for networks whose activations at few bits are far from those of the float network."""

    def phases(self) -> tuple[Phase, ...]:
        """Roundings and step sizes together."""
        phase = replace(
            self.rounding_phase(),
            activation_scale_lr=self.activation_lr,
            inputs="mixed",
            activations=True,
            quantize_probability=self.quantize_probability,
            calibrate_images=self.calibration_images if self.calibrate_units else None,
            lsq_gradient_scale=True,
            sampling="replacement",
        )
        return (self.with_error(phase),)
