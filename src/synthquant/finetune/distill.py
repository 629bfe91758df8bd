"""Distillation on images that exist, real or synthetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from synthquant.core.settings import is_unset
from synthquant.finetune.batches import ImagePool, batch_of
from synthquant.finetune.dealt import from_first
from synthquant.finetune.fine_tuning import FineTuning
from synthquant.finetune.inverted import require_statistics
from synthquant.finetune.renewal import NEEDING, Renewal, RenewedPool
from synthquant.methods import FINE_TUNERS

if TYPE_CHECKING:
    from synthquant.core.processes import Processes
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.finetune.batches import BatchSource
    from synthquant.finetune.student import Student
    from synthquant.models.float_model import FloatModel
    from synthquant.models.held_out import HeldOut

_NAME = "distill"


@FINE_TUNERS.register(_NAME)
class Distill(FineTuning):
    """GenQ: quantization-aware training from a quantized network, on given images (arXiv:2312.05272, section 3.4).

    The network learns the float network's answers on the images; with `form: weights`, `distillation: 0` and
    `cross_entropy: 1` on labelled images it is LSQ (arXiv:1902.08153). Departures from the papers:

    - the loss that GenQ trains with is not published: distillation is the default, labels where they are asked for;
    - `adamw` at rates relative to step sizes (GenQ: SGD at 1e-3), because batch norms are folded;
    - batch norms that the quantized network kept use the statistics that they have and do not take up others: those of
      synthetic images are not those of real ones;
    - the result is the state that agrees best with the float network on images held out, never on images it is
      measured on;
    - of SynQ (ICLR 2025) its labels by the teacher's leave, feature and attention terms are there; the second forward
      pass on perturbed images of the released code is not, and its factors of 20 and 4,000 are in no weight here.
    """

    needs_images: ClassVar[bool] = True

    renewal: Renewal | None = Field(default=None, exclude_if=is_unset)
    """Make images anew, from time to time, where the network still disagrees with its teacher; none: never."""

    @property
    def name(self) -> str:
        """What the method is registered as."""
        return _NAME

    def check(self, model: FloatModel) -> None:
        """Raise `UnsupportedModelError` if the network gives no logits, or has no statistics to renew images from."""
        super().check(model)
        if self.renewal is not None:
            require_statistics(model, NEEDING)

    def source(self, student: Student, images: ImageSet, parts: HeldOut, rng: Rng, processes: Processes) -> BatchSource:
        """The images that are not held out, shuffled in each epoch."""
        model, chosen = student.network.float_model, parts.training
        renewal = self.renewal
        if renewal is None:
            return ImagePool(images, chosen, model, self.batch_size, rng, processes)
        size = batch_of(self.batch_size, len(chosen), processes)
        return from_first(
            lambda: RenewedPool(images, chosen, student, self.batch_size, rng, renewal), size, model, processes
        )
