"""Images in pixel space with labels and further columns, in memory or on disk, of any number."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthquant.core.errors import DataError, did_you_mean
from synthquant.core.files import atomic_folder
from synthquant.core.progress import QUIET, Progress
from synthquant.data.codec import MAX_PIXELS, encode, regular_file
from synthquant.data.manifest import Framing, ImageDtype, Manifest, SetAside, read_manifest, write_manifest
from synthquant.data.part_writer import PartsWriter
from synthquant.data.parts import ParquetRows, PartFile, require_hash
from synthquant.data.pixels import checked_columns, checked_labels, stored_pixels
from synthquant.data.reading import Decoded, ReadingNotes, Transform, decode_ahead, pixels
from synthquant.data.rows import DetachedRows, MemoryRows, Rows, Stored

_SAVED_TOGETHER = 250
_PART_COUNT = 5000
_PART_PIXEL_BYTES = 512 * 2**20


@dataclass(frozen=True)
class ImageRecord:
    """One image with all that is known of it."""

    image: Tensor
    """`[C,h,w]`, uint8, or float16 in pixel space."""
    label: int | None
    """Class index."""
    columns: dict[str, Any]
    """Further values."""


@dataclass(frozen=True)
class Batch:
    """Some images of a set."""

    images: list[Tensor]
    """Each `[C,h,w]`, uint8, or float16 in pixel space."""
    labels: Tensor | None
    """int64 `[B]`, -1 where an image has no label; none if no image of the set has one."""
    indices: list[int]
    """Positions in the set."""


class ImageSet:
    """Images of any number of channels (RGB if they are pictures), labels and columns.

    Values are in 0..1 nominally: uint8, or float16 where they leave that range.

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
        class_numbers: Tensor | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._rows = rows
        self._positions = positions  # into rows; none means all of them in order
        self._added_columns = dict(columns or {})
        self._read_columns: dict[str, list[Any]] = {}
        self._labels: Tensor | None = None
        self._labels_read = False
        self._class_numbers = class_numbers  # of the rows' labels; none: they are class numbers
        self.notes = ReadingNotes()
        self.max_pixels = max_pixels
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
        """Return a set of images `[N,C,H,W]` in memory: uint8, or floats in pixel space (0..1 nominal).

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

        The hash of a part is checked when it is first read; `verify` checks all.
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
        """Raise `DataError` naming the first part that is missing or whose hash is not the manifest's."""
        if self.folder is not None:
            for part in self.manifest.parts:
                require_hash(self.folder / part.name, part.sha256)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images)"

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
            image = pixels(stored, self.max_pixels)
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
            labels = labels if labels is None or self._positions is None else labels[self._positions]
            if labels is not None and self._class_numbers is not None:
                if len(labels) and int(labels.max()) >= len(self._class_numbers):
                    raise DataError(
                        f"a label is {int(labels.max())}, and the image set names {len(self._class_numbers)} classes;"
                        " its manifest and its labels do not belong together"
                    )
                labels = torch.where(labels < 0, labels, self._class_numbers[labels.clamp(min=0)])
            self._labels = labels
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
        return (*self.manifest.set_aside, *self.notes.broken.values())

    @property
    def example_set_aside(self) -> str:
        """One of `set_aside` with its reason, in brackets, to stand behind a message; empty if there is none."""
        return f" (for example {self.set_aside[0].name}: {self.set_aside[0].reason})" if self.set_aside else ""

    @property
    def fingerprint(self) -> str:
        """Hash that changes when the images, their order or their columns change."""
        digest = hashlib.sha256(self._rows.fingerprint().encode())
        if self._positions is not None:
            digest.update(self._positions.numpy().tobytes())
        if self._class_numbers is not None:
            digest.update(self._class_numbers.numpy().tobytes())
        for name in sorted(self._added_columns):
            digest.update(f"{name} {self._added_columns[name]!r}".encode())
        return digest.hexdigest()

    def with_columns(self, **columns: Sequence[Any] | Tensor) -> ImageSet:
        """Return this set with further columns, one value an image; a column of the same name is replaced."""
        added = self._added_columns | checked_columns(columns, len(self))
        return self._derived(self.manifest, self._positions, added)

    def with_class_numbers(self, numbers: Sequence[int]) -> ImageSet:
        """Return this set with the label `numbers[i]` where it has `i`, in place of the manifest's `class_names`."""
        manifest = self.manifest.model_copy(update={"class_names": None})
        return self._derived(manifest, self._positions, self._added_columns, torch.tensor(numbers, dtype=torch.int64))

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
        return ImageSet(DetachedRows(stored), manifest, max_pixels=self.max_pixels)

    def batches(
        self, batch_size: int, indices: Sequence[int] | None = None, transform: Transform | None = None
    ) -> Iterator[Batch]:
        """Yield the images in batches of `batch_size`, the last one smaller; threads decode ahead.

        `transform` is applied to each image in those threads. A broken image is left out of its batch, which is
        then smaller, and noted in `set_aside`; a batch with no usable image is not yielded. What was changed on
        reading is in `notes`.
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
                raise DataError(f"none of {len(self)} images is usable{self.example_set_aside}")
            fields = {"set_aside": self.set_aside, **writer.manifest_fields()}
            write_manifest(temporary, self.manifest.model_copy(update=fields))
        for warning in writer.scan.report().warnings():
            progress.warn(f"{folder}: {warning}")
        return ImageSet.open(folder)

    def _part_groups(self) -> Iterator[Decoded]:
        """Yield images in groups of a part's size."""
        group, size = Decoded([], [], []), 0
        for decoded in self._decoded(_SAVED_TOGETHER, None, None):
            group.extend(decoded)
            size += sum(image.nbytes for image in decoded.images)
            if len(group.indices) >= _PART_COUNT or size >= _PART_PIXEL_BYTES:
                yield group
                group, size = Decoded([], [], []), 0
        if group.indices:
            yield group

    def _write_part(self, writer: PartsWriter, group: Decoded) -> None:
        labels = None if self.labels is None else self.labels[group.indices]
        columns = {name: [self.column(name)[index] for index in group.indices] for name in self.column_names}
        encoded = [_encoded(stored.content) for stored in group.stored]
        in_memory = isinstance(group.stored[0].content, Tensor)
        names = None if in_memory else [stored.name for stored in group.stored]
        writer.write(group.images, labels, columns, encoded=encoded, names=names)

    def _decoded(
        self, batch_size: int, indices: Sequence[int] | None, transform: Transform | None
    ) -> Iterator[Decoded]:
        if batch_size < 1:
            raise DataError(f"batch size must be at least 1, got {batch_size}")
        order = range(len(self)) if indices is None else indices
        return decode_ahead(self._fetch, order, batch_size, transform, self.notes, self.max_pixels)

    def _fetch(self, indices: Sequence[int]) -> list[Stored]:
        if self._positions is None:
            return self._rows.fetch(indices)
        return self._rows.fetch(self._positions[torch.as_tensor(indices, dtype=torch.int64)].tolist())

    def _derived(
        self,
        manifest: Manifest,
        positions: Tensor | None,
        columns: Mapping[str, list[Any]],
        class_numbers: Tensor | None = None,
    ) -> ImageSet:
        return ImageSet(
            self._rows,
            manifest,
            positions=positions,
            columns=columns,
            class_numbers=self._class_numbers if class_numbers is None else class_numbers,
            max_pixels=self.max_pixels,
        )


def _read(content: bytes | Path | Tensor) -> bytes | Path | Tensor:
    if isinstance(content, Tensor):
        return content.clone()  # without the rest of the tensor that it may lie in
    try:
        return regular_file(content).read_bytes() if isinstance(content, Path) else content
    except (OSError, ValueError):
        return content  # who decodes it says why it cannot be read


def _encoded(content: bytes | Path | Tensor) -> bytes:
    if isinstance(content, Tensor):
        return encode(content)
    return content.read_bytes() if isinstance(content, Path) else content
