"""Post-training quantization: ranges, and reconstruction unit by unit.

`synthquant.quantize(...)`, called as a function, is that of `synthquant.verbs`.

- `adaround`: AdaRound: roundings, layer by layer or block by block.
- `bias_correction`: the mean error of rounded weights taken out of biases.
- `brecq`: BRECQ: roundings first, activation steps after.
- `cache`: where the inputs and outputs of units are kept: device, memory, files.
- `calibrate`: ranges: where the grids of weights and activations lie before anything is learned.
- `difference_ranges`: ranges of differences between the steps of a sampler.
- `equalize`: finding the factors by which channels are scaled before quantization.
- `erq`: ERQ: weights regressed on quantized inputs and rounded half of the columns at a time.
- `fima`: the error of FIMA-Q: as a low-rank and diagonal Fisher matrix weighs it.
- `fisher`: how much the network's answer depends on a unit's output.
- `genie_m`: Genie-M: step sizes and roundings together.
- `global_local`: an error seen from behind the network and from behind the unit itself, after GLF-Q.
- `layout`: where the channels of a unit's output are: first, as in feature maps, or last, as in tokens.
- `learn`: learning the roundings and step sizes of one unit.
- `moments`: sums over what layers read, from which their weights are regressed.
- `network_errors`: errors of a unit that look at the network's answer: settings of the methods that offer them.
- `output_correction`: what is systematic in the error of the output taken out of the last layer.
- `output_scales`: outputs whose channels differ in scale, which stay in floating point.
- `ptq4vit`: PTQ4ViT: ranges searched by how much the network's answer depends on what they change.
- `q_diffusion`: Q-Diffusion: roundings, then activation steps, from batches of all sampler steps.
- `qdrop`: QDrop: roundings learned while activations are dropped at random.
- `readers`: what layers and products read, with the gradients of what they put out.
- `reconstruct`: unit by unit reconstruction: one engine for AdaRound, BRECQ, QDrop and Genie-M.
- `reparameterize`: layer norms changed with the layers behind them, so that one grid does what grids of channels did.
- `replay`: running a network up to one unit, or from one on, without running the units before it.
- `repq_vit`: RepQ-ViT: rounding to nearest behind reparameterised layer norms.
- `rotation`: input channels rotated by Hadamard matrices, with ranges at run time.
- `rounding`: what the methods that learn roundings have in common: settings, and the one way to apply them.
- `rtn`: rounding to nearest, the baseline.
- `running_ranges`: ranges of activations as moving averages over all samples.
- `sampler_steps`: batches and orders in which all steps of a sampler count alike.
- `shortcut_ranges`: ranges of the halves of concatenated shortcuts.
- `unit_files`: finished units on disk, so that a killed reconstruction goes on where it stopped.
- `unit_fit`: one unit while it is fitted: what it reads and gives, its error, learning it.
"""

import sys

from synthquant.core.verbs import VerbPackage
from synthquant.quantize.adaround import AdaRound
from synthquant.quantize.brecq import Brecq
from synthquant.quantize.erq import Erq
from synthquant.quantize.genie_m import GenieM
from synthquant.quantize.ptq4vit import Ptq4Vit
from synthquant.quantize.q_diffusion import QDiffusion
from synthquant.quantize.qdrop import QDrop
from synthquant.quantize.repq_vit import RepqVit
from synthquant.quantize.rotation import Rotation
from synthquant.quantize.rtn import Rtn

__all__ = ["AdaRound", "Brecq", "Erq", "GenieM", "Ptq4Vit", "QDiffusion", "QDrop", "RepqVit", "Rotation", "Rtn"]

sys.modules[__name__].__class__ = VerbPackage
