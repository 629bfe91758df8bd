"""What keeps images apart in any method of inversion: slack and sample correlation, as settings and as terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from synthquant.core.settings import is_unset
from synthquant.synthesize.correlation import Correlation, SampleCorrelation
from synthquant.synthesize.inversion import Objective
from synthquant.synthesize.low_pass import LowPass
from synthquant.synthesize.slack import Slack, measure_slack

if TYPE_CHECKING:
    from synthquant.core.progress import Progress
    from synthquant.core.rng import Rng
    from synthquant.models.float_model import FloatModel
    from synthquant.synthesize.batches import Batch
    from synthquant.synthesize.inversion import InvertedNetwork


class Diversity(LowPass):
    """Settings of a method of inversion that can use the parts of DSG (arXiv:2109.00212)."""

    slack: Slack | None = Field(default=None, exclude_if=is_unset)
    """Slack distribution alignment of DSG: how far statistics may be off before it counts; none: not at all."""

    correlation: Correlation | None = Field(default=None, exclude_if=is_unset)
    """Sample correlation inhibition of DSG: images of a batch as little alike as noise; none: no such term."""

    def measure(
        self,
        network: InvertedNetwork,
        model: FloatModel,
        batch_size: int,
        shape: Sequence[int],
        rng: Rng,
        progress: Progress,
    ) -> dict[str, Any]:
        """Measure what the loss needs to know of the network; returns it as it is kept with the images.

        Args:
            network: holds it from now on.
            model: the network that is inverted.
            batch_size: images over which statistics are taken.
            shape: of an image, `[C, H, W]`.
            rng: of the image set.
            progress: told how far measuring is.
        """
        if self.slack is None:
            return {}
        own, device = rng.child("slack"), model.device
        return {"slack": measure_slack(network, self.slack, batch_size, shape, own, device, progress)}

    def objective(self, network: InvertedNetwork, model: FloatModel, batch: Batch) -> Objective:
        """Return what is minimised for a batch beside the distance of its statistics."""
        if self.correlation is None:
            return Objective()
        generator = batch.rng.generator("correlation", model.device)
        return Objective(of_images=(SampleCorrelation(self.correlation, len(network.layers), generator),))
