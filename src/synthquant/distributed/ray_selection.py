"""The forward pass of selection over a Ray cluster: workers run the network, this process gathers and chooses.

Batches go to the workers with the bytes of their images and come back as rows of numbers, in order. A batch is what it
is in a single process, so a lost worker's is run again and the choice is the same.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

from synthquant.core.errors import InputError
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess
from synthquant.data.reading import ReadingNotes
from synthquant.distributed.ray_cluster import Worker, WorkerPool
from synthquant.methods import Selector
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.open import open_model
from synthquant.select.batch_norm import BatchNormProbe
from synthquant.select.scan import Block, look


@dataclass(frozen=True)
class LookerTask:
    """What lookers need to know."""

    source: ModelSource
    preprocess: Preprocess
    filters: tuple[Selector, ...]
    norms: bool
    """Whether sums of the batch norms are taken though no filter may need them."""
    batch_size: int


class Looker(Worker):
    """Opens the network and looks at images."""

    def open(self, task: LookerTask, device: str) -> None:
        """Open the network."""
        opened = open_model(task.source, device=device)
        self._model: FloatModel = replace(opened, takes=task.preprocess)
        probes = [filter_.probe(self._model) for filter_ in task.filters]
        if task.norms:
            probes.append(BatchNormProbe(self._model.module))
        self._probes = list({probe.name: probe for probe in probes}.values())
        self._batch_size = task.batch_size

    def look(self, images: ImageSet) -> tuple[list[Block], ReadingNotes]:
        """Return what the forward pass of a batch leaves, and what is noted of reading its images."""
        blocks = list(look(images, self._model, self._probes, self._batch_size))
        return blocks, images.notes

    def _opened(self) -> str:
        return self._model.fingerprint


def require_same_network(fingerprints: list[str], model: FloatModel) -> None:
    """Raise `InputError` if a worker has opened another network than this process has."""
    if any(fingerprint != model.fingerprint for fingerprint in fingerprints):
        raise InputError(
            f"a worker opens other weights under the name {model.source.source} than this machine; give all machines"
            " the same files"
        )


def look_with(pool: WorkerPool, images: ImageSet, batch_size: int) -> Generator[Block]:
    """Yield the blocks of a pool of images in order; those that workers cannot read are set aside here."""
    starts = range(0, len(images), batch_size)
    batches = (images.detached(range(start, min(start + batch_size, len(images)))) for start in starts)
    for first, (blocks, notes) in zip(starts, pool.in_order("look", batches), strict=True):
        images.notes.add(notes, first)
        for block in blocks:
            yield replace(block, first=first)
