"""Images in pixel space with labels and further columns, in memory or on disk, of any number."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthquant.core.errors import DataError, did_you_mean
from synthquant.core.files import atomic_folder, sha256_file
from synthquant.core.progress import QUIET, Progress
from synthquant.data.codec import decode, encode
from synthquant.data.manifest import Framing, ImageDtype, Manifest, SetAside, read_manifest, write_manifest
from synthquant.data.part_writer import PartsWriter
from synthquant.data.parts import ParquetRows, PartFile
from synthquant.data.pixels import checked_columns, checked_labels, stored_pixels
from synthquant.data.rows import DetachedRows, MemoryRows, Rows, Stored

_BATCHES_AHEAD = 2
_MAX_THREADS = 16
_SAVED_TOGETHER = 250
_PART_COUNT = 5000
_PART_PIXEL_BYTES = 512 * 2**20

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ImageRecord:
    """One image with all that is known of it."""

    image: Tensor
    """`[3,h,w]`, uint8, or float16 in pixel space."""
    label: int | None
    """Class index."""
    columns: dict[str, Any]
    """Further values."""


@dataclass(frozen=True)
class Batch:
    """Some images of a set."""

    images: list[Tensor]
    """Each `[3,h,w]`, uint8, or float16 in pixel space."""
    labels: Tensor | None
    """int64 `[B]`, -1 where an image has no label; none if no image of the set has one."""
    indices: list[int]
    """Positions in the set."""


@dataclass(frozen=True)
class _Decoded:
    """Usable images of a batch, pixels beside what is stored."""

    indices: list[int]
    stored: list[Stored]
    images: list[Tensor]

    def extend(self, other: _Decoded) -> None:
        self.indices.extend(other.indices)
        self.stored.extend(other.stored)
        self.images.extend(other.images)


class ImageSet:
    """Images (RGB, 0..1 nominal; uint8, or float16 where values leave that range), labels and columns.

    Images are read when asked for; only an index is kept in memory. A set is never changed: `subset` and
    `with_columns` return new ones over the same images.
    """

    def __init__(
        self,
        rows: Rows,
        manifest: Manifest,
        *,
        positions: Tensor | None = None,
        columns: Mapping[str, list[Any]] | None = None,
    ) -> None:
        self._rows = rows
        self._positions = positions  # into rows; none means all of them in order
        self._added_columns = dict(columns or {})
        self._read_columns: dict[str, list[Any]] = {}
        self._labels: Tensor | None = None
        self._labels_read = False
        self._broken: dict[int, SetAside] = {}  # by position: names need not be unique
        self.manifest = manifest
        self.folder: Path | None = None

    @classmethod
    def from_tensors(
        cls,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        dtype: ImageDtype | None = None,
        columns: Mapping[str, Sequence[Any] | Tensor] | None = None,
        framing: Framing = "cropped",
        method: str | None = None,
        settings: Mapping[str, Any] | None = None,
        seed: int | None = None,
        model_fingerprint: str | None = None,
    ) -> ImageSet:
        """Return a set of images `[N,3,H,W]` in memory: uint8, or floats in pixel space (0..1 nominal).

        Floats become float16 if any value leaves 0..1, else uint8, unless `dtype` decides.
        Raises `DataError` on other shapes or types.
        """
        images = stored_pixels(images, dtype)
        manifest = Manifest(
            count=len(images),
            dtype="uint8" if images.dtype == torch.uint8 else "float16",
            framing=framing,
            image_size=(images.shape[2], images.shape[3]),
            method=method,
            settings=dict(settings or {}),
            seed=seed,
            model_fingerprint=model_fingerprint,
        )
        stored_labels = None if labels is None else checked_labels(labels, len(images))
        return cls(MemoryRows(images, stored_labels, checked_columns(columns, len(images))), manifest)

    @classmethod
    def open(cls, folder: Path | str) -> ImageSet:
        """Open a finished image set; raises `DataError` if it is none, or a part is missing.

        Hashes are not checked here but in `verify`.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        for part in manifest.parts:
            if not (folder / part.name).is_file():
                raise DataError(f"{folder / part.name} is missing; make the image set again")
        files = [PartFile(folder / part.name, part.count) for part in manifest.parts]
        if sum(part.count for part in manifest.parts) != manifest.count:
            raise DataError(f"manifest of {folder} promises {manifest.count} images, its parts hold another number")
        image_set = cls(ParquetRows(files, known_hashes=[part.sha256 for part in manifest.parts]), manifest)
        image_set.folder = folder
        return image_set

    def verify(self) -> None:
        """Raise `DataError` naming the first part whose hash is not the manifest's."""
        if self.folder is None:
            return
        for part in self.manifest.parts:
            path = self.folder / part.name
            if not path.is_file():
                raise DataError(f"{path} is missing; make the image set again")
            if sha256_file(path) != part.sha256:
                raise DataError(f"{path} is damaged: its hash differs from the manifest; make the image set again")

    def __len__(self) -> int:
        return len(self._rows) if self._positions is None else len(self._positions)

    def __getitem__(self, index: int) -> ImageRecord:
        """Return one image; raises `IndexError` beyond the end and `DataError` if the image is broken."""
        size = len(self)
        if not -size <= index < size:
            raise IndexError(f"image {index} of {size}")
        index %= size
        (stored,) = self._fetch([index])
        try:
            image = pixels(stored)
        except DataError as error:
            raise DataError(f"image {index} ({stored.name}): {error}") from error
        label = -1 if self.labels is None else int(self.labels[index])
        columns = {name: self.column(name)[index] for name in self.column_names}
        return ImageRecord(image, None if label < 0 else label, columns)

    @property
    def labels(self) -> Tensor | None:
        """Labels, int64 `[N]`, -1 where an image has none; none if no image has one."""
        if not self._labels_read:
            labels = self._rows.labels()
            self._labels = labels if labels is None or self._positions is None else labels[self._positions]
            self._labels_read = True
        return self._labels

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns besides image and label, sorted."""
        return tuple(sorted({*self._rows.column_names, *self._added_columns}))

    def column(self, name: str) -> list[Any]:
        """Return all values of a column; raises `DataError` if there is none of that name."""
        if name in self._added_columns:
            return self._added_columns[name]
        if name not in self._rows.column_names:
            listed = ", ".join(self.column_names) or "(none)"
            raise DataError(
                f"image set has no column {name!r};{did_you_mean(name, self.column_names)} columns: {listed}"
            )
        if name not in self._read_columns:
            values = self._rows.column(name)
            if self._positions is not None:
                values = [values[position] for position in self._positions.tolist()]
            self._read_columns[name] = values
        return self._read_columns[name]

    @property
    def set_aside(self) -> tuple[SetAside, ...]:
        """Images found broken so far, with reasons: on import, and while reading batches."""
        return (*self.manifest.set_aside, *self._broken.values())

    @property
    def broken(self) -> dict[int, SetAside]:
        """Images found broken while reading batches, by position."""
        return dict(self._broken)

    @property
    def fingerprint(self) -> str:
        """Hash that changes when the images, their order or their columns change."""
        digest = hashlib.sha256(self._rows.fingerprint().encode())
        if self._positions is not None:
            digest.update(self._positions.numpy().tobytes())
        for name in sorted(self._added_columns):
            digest.update(f"{name} {self._added_columns[name]!r}".encode())
        return digest.hexdigest()

    def with_columns(self, **columns: Sequence[Any] | Tensor) -> ImageSet:
        """Return this set with further columns, one value an image; a column of the same name is replaced."""
        added = self._added_columns | checked_columns(columns, len(self))
        return self._derived(self.manifest, self._positions, added)

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """Return the images at these positions, in this order; raises `DataError` beyond the end."""
        chosen = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < len(self):
            raise DataError(f"subset of {len(self)} images asks for position {int(chosen.max())} or a negative one")
        positions = chosen if self._positions is None else self._positions[chosen]
        columns = {name: [values[i] for i in chosen.tolist()] for name, values in self._added_columns.items()}
        fields = {"count": len(chosen), "parts": (), "statistics": None, "quality": {}}
        return self._derived(self.manifest.model_copy(update=fields), positions, columns)

    def detached(self, indices: Sequence[int]) -> ImageSet:
        """Return the images at these positions with their bytes and nothing else: no labels, columns or files.

        Other processes and machines can take it as it is; it is meant for a few images at a time.
        """
        stored = [replace(one, content=_read(one.content)) for one in self._fetch(indices)]
        manifest = Manifest(framing=self.manifest.framing, count=len(stored))
        return ImageSet(DetachedRows(stored), manifest)

    def note_broken(self, found: Mapping[int, SetAside]) -> None:
        """Set images aside, by position, that another process could not read."""
        self._broken.update(found)

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None, transform: Transform | None = None
    ) -> Iterator[Batch]:
        """Yield the images in batches of `batch_size`, the last one smaller; threads decode ahead.

        `transform` is applied to each image in those threads. A broken image is left out of its batch, which is
        then smaller, and noted in `set_aside`; a batch with no usable image is not yielded.
        """
        for decoded in self._decoded(batch_size, indices, transform):
            labels = None if self.labels is None else self.labels[decoded.indices]
            yield Batch(decoded.images, labels, decoded.indices)

    def save(self, folder: Path | str, progress: Progress = QUIET) -> ImageSet:
        """Write all images to a new folder and return the set opened from there.

        Images keep their encoding; broken ones are set aside with a reason. Raises `OutputError` if the folder exists
        and is not empty or cannot be written, `DataError` if no image is usable.
        """
        folder = Path(folder)
        with atomic_folder(folder) as temporary:
            writer = PartsWriter(temporary)
            with progress.bar(f"save {folder.name}", len(self)) as bar:
                for group in self._part_groups():
                    self._write_part(writer, group)
                    bar.advance(len(group.indices))
            if not writer.count:
                reason = (
                    f" (for example {self.set_aside[0].name}: {self.set_aside[0].reason})" if self.set_aside else ""
                )
                raise DataError(f"none of {len(self)} images is usable{reason}")
            fields = {"set_aside": self.set_aside, **writer.manifest_fields()}
            write_manifest(temporary, self.manifest.model_copy(update=fields))
        for warning in writer.scan.report().warnings():
            progress.warn(f"{folder}: {warning}")
        return ImageSet.open(folder)

    def _part_groups(self) -> Iterator[_Decoded]:
        """Yield images in groups of a part's size."""
        group, size = _Decoded([], [], []), 0
        for decoded in self._decoded(_SAVED_TOGETHER, None, None):
            group.extend(decoded)
            size += sum(image.nbytes for image in decoded.images)
            if len(group.indices) >= _PART_COUNT or size >= _PART_PIXEL_BYTES:
                yield group
                group, size = _Decoded([], [], []), 0
        if group.indices:
            yield group

    def _write_part(self, writer: PartsWriter, group: _Decoded) -> None:
        labels = None if self.labels is None else self.labels[group.indices]
        columns = {name: [self.column(name)[index] for index in group.indices] for name in self.column_names}
        encoded = [_encoded(stored.content) for stored in group.stored]
        in_memory = isinstance(group.stored[0].content, Tensor)
        names = None if in_memory else [stored.name for stored in group.stored]
        writer.write(group.images, labels, columns, encoded=encoded, names=names)

    def _decoded(
        self, batch_size: int, indices: Sequence[int] | None, transform: Transform | None
    ) -> Iterator[_Decoded]:
        if batch_size < 1:
            raise DataError(f"batch size must be at least 1, got {batch_size}")
        order = range(len(self)) if indices is None else indices
        threads = min(_MAX_THREADS, torch.get_num_threads())
        pool = ThreadPoolExecutor(threads)
        waiting: deque[tuple[Sequence[int], list[Stored], list[Future[list[Tensor | str]]]]] = deque()
        try:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                stored = self._fetch(chosen)
                piece = -(-len(stored) // threads)
                pieces = [stored[first : first + piece] for first in range(0, len(stored), piece)]
                waiting.append((chosen, stored, [pool.submit(_decode_all, some, transform) for some in pieces]))
                if len(waiting) > _BATCHES_AHEAD:
                    yield from self._collect(*waiting.popleft())
            while waiting:
                yield from self._collect(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _collect(
        self, chosen: Sequence[int], stored: list[Stored], tasks: list[Future[list[Tensor | str]]]
    ) -> Iterator[_Decoded]:
        decoded = _Decoded([], [], [])
        results = [result for task in tasks for result in task.result()]
        for index, image, result in zip(chosen, stored, results, strict=True):
            if isinstance(result, str):
                self._broken[index] = SetAside(name=image.name, reason=result)
            else:
                decoded.images.append(result)
                decoded.stored.append(image)
                decoded.indices.append(index)
        if decoded.images:
            yield decoded

    def _fetch(self, indices: Sequence[int]) -> list[Stored]:
        if self._positions is None:
            return self._rows.fetch(indices)
        return self._rows.fetch(self._positions[torch.as_tensor(indices, dtype=torch.int64)].tolist())

    def _derived(self, manifest: Manifest, positions: Tensor | None, columns: Mapping[str, list[Any]]) -> ImageSet:
        return ImageSet(self._rows, manifest, positions=positions, columns=columns)


def pixels(stored: Stored) -> Tensor:
    """Return the image `[3,h,w]` of a stored one; raises `DataError` with the reason if it is broken."""
    return stored.content if isinstance(stored.content, Tensor) else decode(stored.content)


def _decode_all(stored: Sequence[Stored], transform: Transform | None) -> list[Tensor | str]:
    """Return each image, or the reason why there is none."""
    results: list[Tensor | str] = []
    for one in stored:
        try:
            image = pixels(one)
        except DataError as error:
            results.append(str(error))
            continue
        results.append(image if transform is None else transform(image))
    return results


def _read(content: bytes | Path | Tensor) -> bytes | Path | Tensor:
    if isinstance(content, Tensor):
        return content.clone()  # without the rest of the tensor that it may lie in
    try:
        return content.read_bytes() if isinstance(content, Path) else content
    except OSError:
        return content  # who decodes it says why it cannot be read


def _encoded(content: bytes | Path | Tensor) -> bytes:
    if isinstance(content, Tensor):
        return encode(content)
    return content.read_bytes() if isinstance(content, Path) else content
