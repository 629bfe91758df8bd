"""GDFQ: a class-conditional generator learns beside the quantized network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field
from torch.nn import functional as F

from synthquant.finetune.generated import GeneratedFineTuning
from synthquant.methods import FINE_TUNERS
from synthquant.synthesize.inversion import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from synthquant.core.rng import Rng
    from synthquant.finetune.generated import GeneratedImages

_NAME = "gdfq"


class ClassConditional(GeneratedFineTuning):
    """Settings of generators whose images are to be recognised by the float network as their class."""

    flip: bool = False
    """Mirror images at random; the generator makes others in each step."""
    shift: float = Field(default=0.0, ge=0, lt=1)
    """Move images at random by up to this share of their sides."""
    generator_cross_entropy: float = Field(default=1.0, ge=0)
    """Weight, in the generator's loss, of the float network's cross-entropy with the class."""

    def objective(self, images: GeneratedImages, labels: Tensor, rng: Rng) -> Objective:
        """The float network is to recognise the classes."""
        del images, rng
        return Objective(of_logits=lambda logits: self.generator_cross_entropy * F.cross_entropy(logits, labels))


@FINE_TUNERS.register(_NAME)
class GDFQ(ClassConditional):
    """GDFQ: Generative Low-bitwidth Data Free Quantization (arXiv:2003.03603).

    In turns a generator learns to make images that the float network recognises as the class they were made for and
    whose batch statistics are those of its batch norms, and the quantized network learns from the float one on them.
    Departures from the authors' code:

    - Ranges of activations are set at the end of the generator's warm-up, on its images. The code freezes them after
      four epochs, on ImageNet long before the network learns, from images of a hardly trained generator.
    - Statistics are means and deviations (the code: variances), and each image is kept to mean 0 and deviation 1.
    - The loss of the network is distillation at the temperature of `temperature`, mean over the batch, and labels where
      `cross_entropy` asks for them; the code's mean over batch and classes weighs distillation less by the number of
      classes.
    - One conditional batch norm for all sizes of images (the code: on CIFAR noise is multiplied by a vector of the
      class), and the usual epsilon in it.
    - The result is chosen on images held out, where the code reports the best epoch on the test set.
    """

    @property
    def name(self) -> str:
        """What the method is registered as."""
        return _NAME
