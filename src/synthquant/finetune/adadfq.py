"""AdaDFQ: a generator whose images the two networks disagree on, but not too much."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch.nn import functional as F

from synthquant.core.modules import frozen
from synthquant.finetune.generated import GeneratedFineTuning
from synthquant.methods import FINE_TUNERS
from synthquant.synthesize.inversion import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from synthquant.core.rng import Rng
    from synthquant.finetune.generated import GeneratedImages

_NAME = "adadfq"


@FINE_TUNERS.register(_NAME)
class AdaDFQ(GeneratedFineTuning):
    """AdaDFQ: Adaptive Data-Free Quantization (arXiv:2303.06869).

    A game between generator and quantized network. With logits `z_f` of the float and `z_q` of the quantized network,
    `h = (H - H_min) / (H_max - H_min)` is the entropy of `softmax(z_f - z_q)` brought to 0..1 by the smallest of the
    batch and the largest possible: high where the networks agree. The generator minimises

        mean max(lower - h, 0) + mean max(h - upper, 0)
            + disagreement * CE(z_f - z_q, y) + agreement * CE(z_f + z_q, y) + batch_norm * distance

    so that images are neither hopeless nor known already. The quantized network learns by distillation; in the authors'
    code it maximises the entropy of `softmax((z_f - z_q) / 20)`, which is at its largest where logits differ by a
    constant, as they do where distillation ends. Other departures: see `gdfq`.
    """

    flip: bool = False
    """Mirror images at random; the generator makes others in each step."""
    shift: float = Field(default=0.0, ge=0, lt=1)
    """Move images at random by up to this share of their sides."""
    batch_norm: float = Field(default=1.0, gt=0)
    """Weight, in the generator's loss, of the distance of batch statistics, mean over batch norms and channels."""
    lower: float = Field(default=0.1, ge=0, le=1)
    """Agreement below which an image is hopeless."""
    upper: float = Field(default=0.8, ge=0, le=1)
    """Agreement above which an image teaches nothing."""
    disagreement: float = Field(default=0.2, ge=0)
    """Weight of classes that the float network knows and the quantized one does not."""
    agreement: float = Field(default=0.1, ge=0)
    """Weight of classes that both know."""

    @property
    def name(self) -> str:
        """What the method is registered as."""
        return _NAME

    def objective(self, images: GeneratedImages, labels: Tensor, rng: Rng) -> Objective:
        """Bounded disagreement of the two networks."""
        del rng
        student, teacher = images.student, images.student.network.float_model.module

        def game(made: Tensor) -> Tensor:
            with student.training(), frozen(student.network):
                own = student.network(made).float()
            return game_loss(teacher(made).float(), own, labels, self)

        return Objective(of_images=(game,))


def game_loss(teacher: Tensor, student: Tensor, labels: Tensor, settings: AdaDFQ) -> Tensor:
    """What the generator minimises beside the distance of statistics; a scalar of logits `[B, classes]`."""
    known = agreement_of(teacher, student)
    bounds = F.relu(settings.lower - known).mean() + F.relu(known - settings.upper).mean()
    apart = F.cross_entropy(teacher - student, labels)
    together = F.cross_entropy(teacher + student, labels)
    return bounds + settings.disagreement * apart + settings.agreement * together


def agreement_of(teacher: Tensor, student: Tensor) -> Tensor:
    """Entropy of `softmax(teacher - student)` for each image `[B]`: 0 at the smallest of the batch, 1 at most."""
    shares = F.log_softmax(teacher - student, dim=1)
    entropy = -(shares.exp() * shares).sum(1)
    smallest, largest = entropy.min(), math.log(teacher.shape[1])
    return (entropy - smallest) / (largest - smallest).clamp_min(torch.finfo(entropy.dtype).eps)
