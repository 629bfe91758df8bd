"""AdaRound: adaptive rounding for post-training quantization (arXiv:2004.10568)."""

from __future__ import annotations

from typing import Literal

from synthquant.methods import QUANTIZERS
from synthquant.quantize.learn import Phase
from synthquant.quantize.rounding import LearnedRounding


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

    def phases(self) -> tuple[Phase, ...]:
        """The roundings, with activations in floating point."""
        return (self.rounding_phase(),)
