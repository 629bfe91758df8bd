"""Images that a network is trained on: in memory where they fit, read anew in each epoch where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.processes import ALONE, Processes
from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches, model_inputs
from synthquant.models.float_model import FloatModel

_IN_MEMORY = 2**30
"""Bytes of normalised images that are kept."""


@dataclass(frozen=True)
class TrainingBatch:
    """What one step learns from."""

    images: Tensor
    """Normalised, float32 `[B, C, H, W]`, on the device of the network."""
    labels: Tensor | None
    """int64 `[B]`, -1 where an image has no label; none if no image has one."""


class BatchSource(Protocol):
    """Where the images of each step come from; of several processes each has its own, which yields its shares."""

    def prepare(self, progress: Progress) -> None:
        """Do what comes before the first step; not called where a killed training goes on."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What it has learned so far, by name; copies."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        ...

    def batches(self, start: int = 0) -> Iterator[TrainingBatch]:
        """Yield batches without end, from the one of step `start` (0 is the first) on."""
        ...


class ImageInputs:
    """What a network is given of images in a fixed order.

    Attributes:
        kept: all of them, `[N, C, H, W]` on the device of the network; none where they do not fit into memory.
    """

    def __init__(self, images: ImageSet, chosen: Tensor, model: FloatModel) -> None:
        """Take the images at the positions `chosen`, int64 `[N]`."""
        self._images, self._chosen, self._model = images, chosen, model
        self.kept: Tensor | None = None
        if len(chosen) * _bytes_of(model) <= _IN_MEMORY:
            self.kept = self.prepared(model_inputs(images, model.preprocess, chosen.tolist()))

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield all of them in their order, `size` at a time; those that cannot be read are left out."""
        if self.kept is not None:
            yield from torch.split(self.kept, size)
            return
        for batch in input_batches(self._images, self._model.preprocess, size, self._chosen.tolist()):
            yield self.prepared(batch.inputs)

    def prepared(self, inputs: Tensor) -> Tensor:
        """Inputs as both networks get them: as for all quantization, cut off beyond black and white."""
        return self._model.preprocess.cut_off(inputs).to(self._model.device)


class ImagePool:
    """Batches of a fixed set of images, shuffled in each epoch; which are in one depends on its number alone."""

    def __init__(
        self,
        images: ImageSet,
        chosen: Tensor,
        model: FloatModel,
        batch_size: int,
        rng: Rng,
        processes: Processes = ALONE,
    ) -> None:
        """Serve this process's share of batches of the images at the positions `chosen`.

        Raises `DataError` for labels that are no classes, or if there are too few images for all processes.
        """
        self._images, self._chosen, self._model, self._rng = images, chosen, model, rng
        self._size, self._processes = batch_of(batch_size, len(chosen), processes), processes
        self._labels = _checked_labels(images, model)
        self._inputs = ImageInputs(images, chosen, model)
        kept = self._inputs.kept
        if kept is not None and len(kept) < len(chosen):
            raise DataError(
                f"{len(chosen) - len(kept)} of {len(chosen)} images cannot be read"
                f" ({images.set_aside[-1].reason}); leave them out"
            )

    def prepare(self, progress: Progress) -> None:
        """Nothing: the images are there."""

    def state(self) -> dict[str, Tensor]:
        """Nothing: which images are in a batch depends on its number."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def batches(self, start: int = 0) -> Iterator[TrainingBatch]:
        """Yield batches without end, from batch `start` (0 is the first) on."""
        each = len(self._chosen) // self._size
        epoch, first = divmod(start, each)
        while True:
            order = torch.randperm(len(self._chosen), generator=self._rng.generator(f"epoch-{epoch}"))
            order = order[first * self._size : each * self._size]
            yield from self._epoch(order)
            epoch, first = epoch + 1, 0

    def _epoch(self, order: Tensor) -> Iterator[TrainingBatch]:
        device, kept = self._model.device, self._inputs.kept
        if kept is not None:
            for rows in map(self._processes.share, torch.split(order, self._size)):
                labels = None if self._labels is None else self._labels[self._chosen[rows]].to(device)
                yield TrainingBatch(kept[rows.to(device)], labels)
            return
        # No process decodes images of others.
        rows = torch.cat([self._processes.share(rows) for rows in torch.split(order, self._size)])
        size = self._size // self._processes.count
        for batch in input_batches(self._images, self._model.preprocess, size, self._chosen[rows].tolist()):
            if self._processes.count > 1 and len(batch.indices) < size:
                raise DataError(
                    f"an image cannot be read ({self._images.set_aside[-1].reason}); leave it out: several processes"
                    " need shares of one size"
                )
            labels = None if self._labels is None else self._labels[batch.indices].to(device)
            yield TrainingBatch(self._inputs.prepared(batch.inputs), labels)


def batch_of(batch_size: int, count: int, processes: Processes) -> int:
    """Images of a batch: all `count` if there are fewer; raises `DataError` if processes then do not divide them."""
    size = min(batch_size, count)
    if size % processes.count:
        raise DataError(
            f"the {count} images to train on are fewer than a batch, and {processes.count} processes do not divide"
            f" them; give more images, or set batch_size to {max(1, size // processes.count) * processes.count}"
        )
    return size


def _bytes_of(model: FloatModel) -> int:
    height, width = model.preprocess.input_size
    return model.preprocess.channels * height * width * torch.float32.itemsize


def _checked_labels(images: ImageSet, model: FloatModel) -> Tensor | None:
    labels = images.labels
    if labels is None or not len(labels) or model.num_classes is None:
        return labels
    highest = int(labels.max())
    if highest >= model.num_classes:
        raise DataError(
            f"the images have labels up to {highest} but {model.name} has {model.num_classes} classes "
            f"(0 to {model.num_classes - 1}); give images of its classes, or leave labels out"
        )
    return labels
