"""Batches that one of several processes makes and deals out: those whose images cannot be made apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synthquant.core.processes import Processes
from synthquant.core.progress import Progress
from synthquant.finetune.batches import BatchSource, TrainingBatch

if TYPE_CHECKING:
    from synthquant.models.float_model import FloatModel


def from_first(
    make: Callable[[], BatchSource], batch_size: int, model: FloatModel, processes: Processes
) -> BatchSource:
    """A source of batches of that size which the first process makes; every process gets its share of each."""
    if processes.count == 1:
        return make()
    return DealtBatches(make() if processes.is_first else None, batch_size, model, processes)


class DealtBatches:
    """Of each batch of a source that the first process alone has, every process gets its share."""

    def __init__(self, source: BatchSource | None, batch_size: int, model: FloatModel, processes: Processes) -> None:
        """Deal whole batches of `batch_size` normalised images of `model`; only the first process has a `source`."""
        self._source, self._device, self._processes = source, model.device, processes
        self._shape = (batch_size, model.preprocess.channels, *model.preprocess.input_size)

    def prepare(self, progress: Progress) -> None:
        """Let the source do what comes first."""
        if self._source is not None:
            self._source.prepare(progress)

    def state(self) -> dict[str, Tensor]:
        """That of the source."""
        return {} if self._source is None else self._source.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        if self._source is not None:
            self._source.load(state)

    def batches(self, start: int = 0) -> Iterator[TrainingBatch]:
        """Yield this process's shares, without end; -1 stands for labels that there are not."""
        made = None if self._source is None else self._source.batches(start)
        while True:
            images, labels = None, None
            if made is not None:
                batch = next(made)
                images, labels = batch.images, batch.labels
                if labels is None:
                    labels = torch.full((len(images),), -1, device=self._device)
            yield TrainingBatch(
                self._processes.deal(images, self._shape, torch.float32, self._device),
                self._processes.deal(labels, self._shape[:1], torch.int64, self._device),
            )
