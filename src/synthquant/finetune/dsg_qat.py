"""DSG for quantization-aware training: GDFQ with slack and sample correlation inhibition."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from synthquant.finetune.gdfq import ClassConditional
from synthquant.methods import FINE_TUNERS
from synthquant.synthesize.correlation import Correlation, SampleCorrelation
from synthquant.synthesize.slack import Slack, measure_slack

if TYPE_CHECKING:
    from torch import Tensor

    from synthquant.core.rng import Rng
    from synthquant.finetune.generated import GeneratedImages
    from synthquant.synthesize.inversion import InvertedNetwork, Objective

_NAME = "dsg_qat"


@FINE_TUNERS.register(_NAME)
class DSGQAT(ClassConditional):
    """Diverse Sample Generation (arXiv:2109.00212), DSG in its form for quantization-aware training.

    GDFQ whose generator may leave statistics off by a slack (slack distribution alignment), and whose images are drawn
    to be as little alike as noise (sample correlation inhibition). Departures from the authors' code, beside those of
    `gdfq`:

    - Gaps within the slack cost nothing. The code takes the absolute value of what a gap lacks to the slack, so that
      smaller gaps cost as well.
    - Layer-wise enhancement multiplies one channel of each layer in the code, because statistics of a batch know no
      samples; it is left out.
    """

    slack: Slack | None = Slack()
    """Slack distribution alignment: how far statistics may be off before it counts; none: not at all."""
    correlation: Correlation | None = Correlation()
    """Sample correlation inhibition: images of a batch as little alike as noise; none: no such term."""

    @property
    def name(self) -> str:
        """What the method is registered as."""
        return _NAME

    def setup(self, network: InvertedNetwork, images: GeneratedImages, rng: Rng) -> None:
        """Measure the slack on noise."""
        if self.slack is not None:
            device = images.student.network.device
            measure_slack(network, self.slack, self.batch_size, images.shape, rng.child("slack"), device)

    def objective(self, images: GeneratedImages, labels: Tensor, rng: Rng) -> Objective:
        """Classes, and images that are little alike."""
        found = super().objective(images, labels, rng)
        if self.correlation is None:
            return found
        noise = rng.generator("correlation", labels.device)
        # Beside a distance that is a sum over layers, as in synthesis.
        return replace(found, of_images=(SampleCorrelation(self.correlation, images.layers, noise),))
