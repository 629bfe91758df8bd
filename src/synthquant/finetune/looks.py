"""What a network in training is worth: its agreement with the float network on images that are looked at in turns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synthquant.core.run_metrics import FineTunePoint
from synthquant.evaluate.accuracy import image_kl
from synthquant.finetune.batches import ImageInputs
from synthquant.models.held_out import HeldOut, agreement

if TYPE_CHECKING:
    from synthquant.data.image_set import ImageSet
    from synthquant.finetune.student import Student

_LOOKED_AT_ONCE = 128


class Looks:
    """Images held out and as many of those trained on, each with the teacher's logits."""

    @torch.no_grad()
    def __init__(self, images: ImageSet, parts: HeldOut, student: Student) -> None:
        self._student, self._model = student, student.network.float_model
        held, trained = parts.held_out, parts.training
        self._looks: list[tuple[ImageInputs, Tensor]] = []
        for chosen in (held, trained[: len(held)]):
            inputs = ImageInputs(images, chosen, self._model)
            self._looks.append((inputs, self._logits(self._model.module, inputs)))

    def measure(self, values: dict[str, Tensor], step: int, loss: float | None) -> FineTunePoint | None:
        """What the student is with `values`; none if something is not finite."""
        if loss is not None and not math.isfinite(loss):
            return None
        with self._student.holding(values):
            held, seen = ([self._logits(self._student.network, images), teacher] for images, teacher in self._looks)
        if not all(bool(torch.isfinite(logits).all()) for logits, _ in (held, seen)):
            return None
        return FineTunePoint(
            step=step,
            loss=loss,
            held_out=agreement(held[1], held[0]),
            training=agreement(seen[1], seen[0]),
            kl=max(0.0, float(image_kl(held[1], held[0]).mean())),
        )

    @torch.no_grad()
    def _logits(self, network: torch.nn.Module, images: ImageInputs) -> Tensor:
        size = self._model.samples_at_once(_LOOKED_AT_ONCE)
        return torch.cat([network(batch).float().cpu() for batch in images.batches(size)])
