"""Training quantized networks end to end without real images; importing this registers the methods.

- `adadfq`: AdaDFQ: a generator whose images the two networks disagree on, but not too much.
- `augment`: random variants of images.
- `batches`: images that are trained on, in memory or read in each epoch.
- `dealt`: batches that one of several processes makes and deals out.
- `distill`: distillation on images that exist: GenQ's fine-tuning, LSQ.
- `dsg_qat`: DSG in its form for training: GDFQ with slack and sample correlation inhibition.
- `fine_tuning`: what all ways of fine-tuning share: settings, and the loop.
- `gdfq`: GDFQ: a class-conditional generator learns beside the network.
- `generated`: what methods with a generator share: its training in turns, warm-up, ranges, state.
- `generator`: the generator: from noise and classes to normalised images.
- `inverted`: the float network whose batch norms images are made to fit.
- `looks`: what a network in training is worth: its agreement with the float network.
- `losses`: distillation, labels, feature maps and attention.
- `optimize`: optimisers, and how their rates rise and fall.
- `renewal`: images made anew, while a network is trained, where it still disagrees with its teacher.
- `state_file`: where a training stands, for one that was killed.
- `student`: the quantized network while it is trained.
"""

from synthquant.finetune.adadfq import AdaDFQ
from synthquant.finetune.distill import Distill
from synthquant.finetune.dsg_qat import DSGQAT
from synthquant.finetune.gdfq import GDFQ

__all__ = ["DSGQAT", "GDFQ", "AdaDFQ", "Distill"]
