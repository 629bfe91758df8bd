"""Images decoded ahead in threads, and what is remembered of their reading."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.data.codec import MAX_PIXELS, Picture, decode
from synthquant.data.manifest import SetAside
from synthquant.data.rows import Stored

_BATCHES_AHEAD = 2
_MAX_THREADS = 16

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Decoded:
    """Usable images of a batch, pixels beside what is stored."""

    indices: list[int]
    """Positions in the set."""
    stored: list[Stored]
    """The images as they are stored."""
    images: list[Tensor]
    """Each `[C,h,w]`."""

    def extend(self, other: Decoded) -> None:
        """Add the images of another batch."""
        self.indices.extend(other.indices)
        self.stored.extend(other.stored)
        self.images.extend(other.images)


@dataclass
class ReadingNotes:
    """What happened to the images of a set while they were read, by position: names need not be unique."""

    broken: dict[int, SetAside] = field(default_factory=dict)
    """Images that could not be read."""
    changed: dict[str, dict[int, str]] = field(default_factory=dict)
    """For each kind of change (see `Picture.changes`), the images it was done to, with their names."""
    told: set[str] = field(default_factory=set)
    """What was said of them already."""

    def add(self, other: ReadingNotes, first: int = 0) -> None:
        """Take over the notes of a part of the set that starts at position `first`."""
        self.broken.update({first + place: found for place, found in other.broken.items()})
        for change, names in other.changed.items():
            self.changed.setdefault(change, {}).update({first + place: name for place, name in names.items()})


def pixels(stored: Stored, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return the image `[C,h,w]` of a stored one; raises `DataError` with the reason if it is broken."""
    return _picture(stored, max_pixels).image


def decode_ahead(
    fetch: Callable[[Sequence[int]], list[Stored]],
    order: Sequence[int],
    batch_size: int,
    transform: Transform | None,
    notes: ReadingNotes,
    max_pixels: int,
) -> Iterator[Decoded]:
    """Yield the images at the positions `order` in batches; broken ones are left out and noted.

    Args:
        fetch: gives the stored images at some positions.
        order: positions in the set.
        batch_size: images fetched together.
        transform: applied to each image in the threads; an image for which it raises `DataError` is a broken one.
        notes: where broken and changed images are entered.
        max_pixels: larger images are broken.
    """
    threads = min(_MAX_THREADS, torch.get_num_threads())
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[Sequence[int], list[Stored], list[Future[list[Picture | str]]]]] = deque()
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            stored = fetch(chosen)
            piece = -(-len(stored) // threads)
            pieces = [stored[first : first + piece] for first in range(0, len(stored), piece)]
            waiting.append((chosen, stored, [pool.submit(_decode_all, some, transform, max_pixels) for some in pieces]))
            if len(waiting) > _BATCHES_AHEAD:
                yield from _collect(*waiting.popleft(), notes)
        while waiting:
            yield from _collect(*waiting.popleft(), notes)
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(
    chosen: Sequence[int], stored: list[Stored], tasks: list[Future[list[Picture | str]]], notes: ReadingNotes
) -> Iterator[Decoded]:
    decoded = Decoded([], [], [])
    results = [result for task in tasks for result in task.result()]
    for index, image, result in zip(chosen, stored, results, strict=True):
        if isinstance(result, str):
            notes.broken[index] = SetAside(name=image.name, reason=result)
            continue
        for change in result.changes:
            notes.changed.setdefault(change, {})[index] = image.name
        decoded.images.append(result.image)
        decoded.stored.append(image)
        decoded.indices.append(index)
    if decoded.images:
        yield decoded


def _decode_all(stored: Sequence[Stored], transform: Transform | None, max_pixels: int) -> list[Picture | str]:
    """Return each image, or the reason why there is none."""
    results: list[Picture | str] = []
    for one in stored:
        try:
            picture = _picture(one, max_pixels)
            if transform is not None:
                picture = picture._replace(image=transform(picture.image))
        except DataError as error:
            results.append(str(error))
        else:
            results.append(picture)
    return results


def _picture(stored: Stored, max_pixels: int) -> Picture:
    if isinstance(stored.content, Tensor):
        return Picture(stored.content, ())
    return decode(stored.content, max_pixels)
