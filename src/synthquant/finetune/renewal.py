"""Making images anew, while a network is trained, where it still disagrees with its teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from synthquant.core.errors import InputError
from synthquant.core.modules import frozen
from synthquant.core.progress import QUIET
from synthquant.core.settings import Settings
from synthquant.finetune.batches import ImagePool, TrainingBatch
from synthquant.finetune.inverted import inverted_network
from synthquant.synthesize.batches import Batch
from synthquant.synthesize.inversion import Objective
from synthquant.synthesize.pixels import optimized_pixels

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.finetune.student import Student

NEEDING = "renewal"
"""What an error about the network calls it."""


class Renewal(Settings):
    """Images that are made anew, every so many steps, against the network as it then is.

    Pixels of some images of the pool are optimised until the two networks disagree on them, while batch statistics stay
    those that batch norms remember: `distance + disagreement * mean exp(-KL(float || quantized))`. They take the place
    of the images that they were made of. After MaskAQ and MimiQ, which make images anew against the quantized network
    in other ways.
    """

    every: int = Field(default=500, ge=1)
    """Steps of training between two renewals."""
    images: int = Field(default=128, ge=2)
    """Images that are made anew each time, drawn from the pool; all, if it has fewer."""
    iterations: int = Field(default=50, ge=1)
    """Optimisation steps of their pixels."""
    pixel_lr: float = Field(default=0.05, gt=0)
    """Adam learning rate of pixels (normalised space)."""
    disagreement: float = Field(default=1.0, ge=0)
    """Weight of the term that falls where the networks disagree."""


class RenewedPool(ImagePool):
    """A pool some of whose images are made anew from time to time."""

    def __init__(
        self, images: ImageSet, chosen: Tensor, student: Student, batch_size: int, rng: Rng, settings: Renewal
    ) -> None:
        """Take the images at the positions `chosen`.

        Raises:
            InputError: they do not fit into memory, where those that are made anew are kept.
            UnsupportedModelError: the float network has no batch norms.
        """
        model = student.network.float_model
        super().__init__(images, chosen, model, batch_size, rng)
        kept = self._inputs.kept
        if kept is None:
            raise InputError(f"{len(chosen)} images are too many to be renewed: they are kept in memory; give fewer")
        self._pool, self._student, self._settings = kept, student, settings
        self._network = inverted_network(model, NEEDING)
        if self._labels is not None:
            self._labels = self._labels.clone()  # those of the images stay as they are

    def batches(self, start: int = 0) -> Iterator[TrainingBatch]:
        """Yield batches as the pool does, and renew images before batch `every`, twice `every` and so on."""
        inner = super().batches(start)
        for index in count(start):
            if index and index % self._settings.every == 0:
                self._renew(self._rng.child(f"renewal-{index}"))
            yield next(inner)

    def state(self) -> dict[str, Tensor]:
        """The images as they are now, and which labels still hold."""
        state = {"images": self._pool.clone()}
        return state if self._labels is None else {**state, "labels": self._labels.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        self._pool.copy_(state["images"])
        if self._labels is not None:
            self._labels = state["labels"].clone()

    def _renew(self, rng: Rng) -> None:
        settings, model = self._settings, self._model
        chosen = torch.randperm(len(self._pool), generator=rng.generator("chosen"))[: settings.images]
        with QUIET.bar("renewal", settings.iterations) as bar:
            made = optimized_pixels(
                self._network,
                self._pool[chosen.to(self._pool.device)].cpu(),
                Batch(0, len(chosen), rng, bar),
                model.device,
                Objective(of_images=(self._agreement,)),
                iterations=settings.iterations,
                pixel_lr=settings.pixel_lr,
                patience=settings.iterations,
            )
        self._pool[chosen.to(self._pool.device)] = model.preprocess.cut_off(made).contiguous()
        if self._labels is not None:  # the image is another one: its class is what the teacher now sees
            self._labels[self._chosen[chosen]] = -1

    def _agreement(self, images: Tensor) -> Tensor:
        with self._student.training(), frozen(self._student.network):
            student = F.log_softmax(self._student.network(images).float(), dim=1)
        teacher = F.log_softmax(self._model.module(images).float(), dim=1)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        return self._settings.disagreement * torch.exp(-divergence).mean()
