"""BRECQ: post-training quantization by block reconstruction (arXiv:2102.05426)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from synthquant.methods import QUANTIZERS
from synthquant.quantize.learn import Phase
from synthquant.quantize.rounding import LearnedRounding


@QUANTIZERS.register("brecq")
class Brecq(LearnedRounding):
    """BRECQ: post-training quantization by block reconstruction (arXiv:2102.05426).

    First the roundings of each block with activations in floating point, then, with the weights done, the step sizes of
    activations from clean inputs. The first layer keeps nearest rounding; other layers of a unit that it is in do not.
    Departures from the authors' code: activations are quantized where layers read them instead of behind the activation
    function; images have 8 bits and end at black and white; below 20,000 iterations rounding logits learn faster
    (`rounding_lr`); a unit that got worse is put back. The option `fisher` measures gradients with the network really
    quantized up to the block, and each image's for itself (theirs: of the mean over a batch), and weighs by 1 and the
    gradient's share of its mean size in that image (theirs: 1 and the gradient itself, which is so much smaller than 1
    that next to nothing is weighted).
    """

    observer: str = "brecq"
    """How ranges are searched where the scheme does not say: `minmax`, `running`, `brecq`, `genie`, `qdrop` or
    `percentile`."""
    activation_iterations: int = Field(default=5000, ge=0)
    """Optimisation steps for each unit in the second phase."""
    activation_lr: float = Field(default=4e-4, gt=0)
    """Adam learning rate of activation step sizes, cosine to 0."""
    activation_norm: float = Field(default=2.4, gt=0)
    """Exponent of the reconstruction error in the second phase."""
    fisher: Literal["diagonal", "full"] | None = None
    """Weight the error of the first phase by squared gradients of the output error, element by element (`diagonal`) or
    by their sum over an image (`full`); none: plain squared error, as in all published commands."""

    def phases(self) -> tuple[Phase, ...]:
        """The roundings, then the step sizes."""
        weights = replace(self.rounding_phase(), fisher=self.fisher, skip_first_layer=True)
        return weights, self.activation_phase(
            self.rounding_phase(), self.activation_iterations, self.activation_lr, self.activation_norm
        )
