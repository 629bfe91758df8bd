"""Text-to-image synthesis over a Ray cluster: workers draw batches, this process checks and writes them.

A batch's prompts and seeds follow from its number, so it does not matter who draws it or how often it is begun: a batch
of a lost worker is drawn again by the process that Ray starts in its place, none is missing and none is there twice.
Parts are written here, in order, so that the set is the one that a single process makes, and is resumed like it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from synthquant.core.errors import InputError
from synthquant.diffusion.embedding import Embedding
from synthquant.distributed.ray_cluster import Worker, WorkerPool
from synthquant.synthesize.drawing import Batch, Drawing
from synthquant.synthesize.text_to_image import DrawingTask


@dataclass(frozen=True)
class DrawerTask:
    """What drawers need to know."""

    drawing: DrawingTask
    embedding: Embedding | None
    """The learned token, if there is one."""


class Drawer(Worker):
    """Opens the generator and draws."""

    def open(self, task: DrawerTask, device: str) -> None:
        """Open the generator."""
        generator = task.drawing.method.open_generator(device)
        self._drawing: Drawing = task.drawing.drawing(generator, task.embedding)

    def draw(self, numbers: range) -> tuple[Batch, list[str]]:
        """Draw a batch; returns it and the prompts that were cut."""
        return self._drawing.draw(numbers), self._drawing.cut

    def redraw(self, batch: Batch, places: list[int]) -> Batch:
        """Draw these images of a batch with their next seed; returns the batch."""
        self._drawing.usable += len(batch.slots)  # the batch has been drawn, if perhaps by another worker
        self._drawing.redraw(batch, places)
        return batch

    def _opened(self) -> str:
        return self._drawing.fingerprint


class DrawerPool(WorkerPool):
    """Drawers as one source of batches, which come in order."""

    def __init__(self, ray: Any, task: DrawerTask, count: int | None, most: int) -> None:
        super().__init__(ray, Drawer, task, count, most)
        self.cut: list[str] = []
        if len(set(self.fingerprints)) > 1:
            raise InputError(
                f"the workers open different generators under the name {task.drawing.method.generator}; give all"
                " machines the same files, and dtype if some have no GPU"
            )
        self.fingerprint = self.fingerprints[0]

    def batches(self, places: Sequence[range]) -> Iterator[Batch]:
        """Draw a batch for each range, several at a time, and yield them in order."""
        for batch, cut in self.in_order("draw", places):
            self.cut += [text for text in cut if text not in self.cut]
            yield batch

    def redraw(self, batch: Batch, places: Sequence[int]) -> None:
        """Draw these images of a batch with their next seed."""
        found = self.get(self.workers[0].redraw.remote(batch, list(places)))
        batch.prompts, batch.images, batch.rejected = found.prompts, found.images, found.rejected
