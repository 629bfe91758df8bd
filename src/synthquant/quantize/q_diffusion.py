"""Q-Diffusion: quantizing diffusion models (arXiv:2302.04304)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from synthquant.methods import QUANTIZERS
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.learn import Phase
from synthquant.quantize.rounding import LearnedRounding
from synthquant.quantize.running_ranges import set_running_ranges


@QUANTIZERS.register("q_diffusion")
class QDiffusion(LearnedRounding):
    """Q-Diffusion: quantizing diffusion models (arXiv:2302.04304).

    First the roundings of each block with activations in floating point, then the step sizes of activations from clean
    inputs, as BRECQ. Samples are what the denoiser was given at steps of its sampler (a trajectory): every batch holds
    all steps in equal shares, and ranges are set on samples of all steps. Shortcuts are split by the scheme
    (`split_shortcuts`), and its `attention.softmax` says bits of softmaxes, whose zero point is 0. Samples that name no
    steps are drawn at random.

    Departures from the authors' code:

    - batches hold all steps (theirs: any samples of the set);
    - nothing is dropped out while blocks learn (theirs: CIFAR's dropout of 0.1 stays on);
    - running ranges are those of float activations (theirs: of activations quantized so far), over samples of all
      steps in turns (theirs: shuffled);
    - a softmax of 16 bits learns its step too (theirs: not);
    - below 20,000 iterations rounding logits learn faster (`rounding_lr`); a block that got worse is put back.
    """

    observer: str = "minmax"
    """How ranges are searched where the scheme does not say: `minmax`, `running`, `brecq`, `genie`, `qdrop` or
    `percentile`."""
    calibration_images: int = Field(default=64, ge=1)
    """Samples from which activation ranges are set."""
    activation_iterations: int = Field(default=5000, ge=0)
    """Optimisation steps for each unit in the second phase."""
    activation_lr: float = Field(default=4e-4, gt=0)
    """Adam learning rate of activation step sizes, cosine to 0."""
    activation_norm: float = Field(default=2.4, gt=0)
    """Exponent of the reconstruction error in the second phase."""
    running_ranges: Literal["all", "softmax"] | None = None
    """Set ranges anew as moving averages over the whole set: those of all activations, as for Stable Diffusion, or
    those of softmaxes (the authors' `rs_sm_only`); none: keep those of the first samples."""
    running_batch_size: int = Field(default=64, ge=1)
    """Samples whose smallest and largest value enter a moving average together (the authors': 64, Stable Diffusion
    16)."""

    def phases(self) -> tuple[Phase, ...]:
        """The roundings, then the step sizes."""
        weights = replace(self.rounding_phase(), sampling="steps")
        return weights, self.activation_phase(
            weights, self.activation_iterations, self.activation_lr, self.activation_norm
        )

    def set_ranges(self, quant_model: QuantModel, calibration: CalibrationSet, *, quantized_weights: bool) -> None:
        """Set ranges on the first samples, then running ones if they are asked for."""
        super().set_ranges(quant_model, calibration, quantized_weights=quantized_weights)
        if self.running_ranges is not None:
            names = quant_model.quantizers if self.running_ranges == "all" else quant_model.softmaxes
            size = self.running_batch_size
            set_running_ranges(quant_model, calibration, names, size, quantized_weights=quantized_weights)
