"""Genie-M: zero-shot quantization, joint learning of step size and rounding (arXiv:2212.04780)."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from synthquant.methods import QUANTIZERS
from synthquant.quantize.learn import Phase
from synthquant.quantize.network_errors import NetworkErrors


@QUANTIZERS.register("genie_m")
class GenieM(NetworkErrors):
    """Genie-M: zero-shot quantization, joint learning of step size and rounding (arXiv:2212.04780).

    As QDrop, and the step sizes of weights are learned too: the integer part of each weight is fixed from the first
    step size, so that scale and rounding do not work against each other. Departures from the authors' code:

    - batch norms are folded, and the learning rate of weight step sizes is therefore relative (theirs: 1e-4, absolute);
    - at fewer than 20,000 iterations the rounding logits learn faster (`rounding_lr`);
    - grids of activations are asymmetric (theirs: symmetric; `scheme.input_activations.symmetric=true`) and keep zero;
    - activation ranges are set with weights rounded to nearest and no dropping (theirs: soft weights, dropping on);
    - what the first layer reads, the image, has 8 bits (theirs: float) on a fixed grid from black to white; pixels
      beyond it are cut off, for the float network too;
    - batches have `batch_size` images for any count of images (theirs: a 32nd of the images);
    - a block's quantized input has one drop mask for all its readers;
    - step sizes stay above zero, and a unit that got worse is put back.
    """

    rounding_weight: float = Field(default=1.0, ge=0)
    """Factor of the regulariser that pushes roundings to 0 or 1, relative to an error summed over channels."""
    weight_scale_lr: float = Field(default=3e-3, ge=0)
    """Adam learning rate of weight step sizes as a share of themselves, at up to 4 bits, cosine to 0; above, as much
    smaller as the grid is finer. 0: fixed, as in AdaRound."""
    activation_lr: float = Field(default=4e-5, gt=0)
    """Adam learning rate of activation step sizes, cosine to 0."""
    quantize_probability: float = Field(default=0.5, gt=0, le=1)
    """Probability that a value is the quantized one (QDrop)."""
    calibration_images: int = Field(default=32, ge=1)
    """Images from which activation ranges are set, anew at each unit, in the network quantized so far."""

    def phases(self) -> tuple[Phase, ...]:
        """Roundings and all step sizes together."""
        phase = replace(
            self.rounding_phase(),
            weight_scale_lr=self.weight_scale_lr,
            activation_scale_lr=self.activation_lr,
            inputs="mixed",
            activations=True,
            quantize_probability=self.quantize_probability,
            sampling="epoch",
            calibrate_images=self.calibration_images,
        )
        return (self.with_error(phase),)
