"""Writing an image set while it is being made, so that a killed run continues with the parts that are missing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from synthquant.core.differences import differences, flat
from synthquant.core.errors import DataError, OutputError
from synthquant.core.files import make_folder, require_writable
from synthquant.core.locks import remove_leftovers
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.data.manifest import (
    MANIFEST_NAME,
    Framing,
    ImageDtype,
    Manifest,
    Part,
    read_manifest,
    read_manifest_file,
    write_manifest,
    write_manifest_file,
)
from synthquant.data.part_writer import PartsWriter
from synthquant.data.parts import ParquetRows, PartFile, require_hash
from synthquant.data.pixels import checked_columns, checked_labels, stored_pixels
from synthquant.data.reading import pixels

JOURNAL_NAME = "parts.json"

_READ_TOGETHER = 256
# What tells two sets apart, the most telling first.
_IDENTITY = ("model_fingerprint", "method", "count", "settings", "seed", "image_size", "dtype", "framing")


class ImageForm(Settings):
    """In which form a synthesis method makes its images; its class says so where it differs from this."""

    dtype: ImageDtype = "float16"
    """Pixel type."""
    framing: Framing = "cropped"
    """Whether an image is what the network sees, or to be resized and cropped first."""
    sized_by_network: bool = True
    """Whether images have the network's input size; else a size of their own."""


class ImageSetWriter:
    """Writes a set of `target_count` images part by part.

    A journal names the finished parts. Opened again after a kill with the same arguments, the writer continues there,
    and ends with the same bytes as an uninterrupted run. Opened on a finished set, it has nothing left to do. Parts
    that are gone or damaged are to be made again, with a warning; all others stay.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        method: str,
        settings: Mapping[str, Any],
        seed: int,
        model_fingerprint: str | None,
        image_size: tuple[int, int] | None,
        target_count: int,
        dtype: ImageDtype = "float16",
        framing: Framing = "cropped",
        progress: Progress = QUIET,
    ) -> None:
        """Open a new, an unfinished or a finished folder. Without `image_size` the first images say it.

        Raises `DataError` if the folder holds images made in another way or does not say which, `OutputError` if it
        holds other things or cannot be written.
        """
        if target_count < 1:
            raise DataError(f"an image set needs at least 1 image, {target_count} were asked for")
        self.folder = Path(folder)
        self.target_count = target_count
        self._manifest = Manifest(
            count=target_count,
            dtype=dtype,
            framing=framing,
            image_size=image_size,
            method=method,
            settings=json.loads(json.dumps(dict(settings))),  # as it will read back: no tuples
            seed=seed,
            model_fingerprint=model_fingerprint,
        )
        self._finished: ImageSet | None = None
        self._writer = PartsWriter(self.folder)  # holds the first parts, up to one that is missing
        self._recorded: tuple[Part, ...] = ()  # parts of former sittings,
        self._whole: set[int] = set()  # and which of them are as they were written
        self._open(progress)

    @property
    def finished_parts(self) -> int:
        """Parts that need not be made again."""
        return len(self._finished_parts())

    @property
    def finished_count(self) -> int:
        """Images in those parts."""
        return sum(part.count for part in self._finished_parts())

    def missing_parts(self, total: int) -> list[int]:
        """Return which parts are to be made and appended, in this order, of `total` in the set."""
        return [index for index in range(len(self._writer.parts), total) if index not in self._whole]

    def append(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        columns: Mapping[str, Sequence[Any] | Tensor] | None = None,
    ) -> None:
        """Write images `[n,C,H,W]` (uint8, or floats in pixel space) as exactly one part.

        Raises `DataError` on a wrong shape, or on more images than were promised.
        """
        images = stored_pixels(images, self._manifest.dtype)
        if self._manifest.image_size is None:
            self._manifest = self._manifest.model_copy(update={"image_size": tuple(images.shape[2:])})
        if tuple(images.shape[2:]) != self._manifest.image_size:
            raise DataError(f"images are {tuple(images.shape[2:])} high and wide, not {self._manifest.image_size}")
        if self._finished is not None or self.finished_count + len(images) > self.target_count:
            raise DataError(f"{len(images)} images more than the {self.target_count} promised for {self.folder}")
        checked = None if labels is None else checked_labels(labels, len(images))
        self._writer.write(list(images), checked, checked_columns(columns, len(images)))
        self._take_whole_parts()
        self._write_journal()

    def written(self) -> ImageSet | None:
        """Return the images of the finished parts; none before the first."""
        parts = self._finished_parts()
        if not parts:
            return None
        rows = ParquetRows([PartFile(self.folder / part.name, part.count) for part in parts])
        return ImageSet(rows, self._manifest.model_copy(update={"count": self.finished_count, "parts": tuple(parts)}))

    def finish(
        self,
        progress: Progress = QUIET,
        redrawn: Mapping[str, int] | None = None,
        measured: Mapping[str, Any] | None = None,
    ) -> ImageSet:
        """Write the manifest, warn about suspicious images and return the set.

        `redrawn` is how many images the method made and did not take, by reason; `measured` what it measured of the
        network to make them. Raises `DataError` if images are missing.
        """
        if self._finished is None:
            if self.finished_count != self.target_count:
                raise DataError(f"{self.folder} has {self.finished_count} of {self.target_count} images")
            fields = {
                **self._writer.manifest_fields(),
                "redrawn": dict(redrawn or {}),
                "measured": dict(measured or {}),
            }
            write_manifest(self.folder, self._manifest.model_copy(update=fields))
            (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
            for warning in self._writer.scan.report().warnings():
                progress.warn(f"{self.folder}: {warning}")
            self._finished = ImageSet.open(self.folder)
        return self._finished

    def _open(self, progress: Progress) -> None:
        if (self.folder / MANIFEST_NAME).is_file():
            self._find_parts(read_manifest(self.folder), progress)
            if self.missing_parts(len(self._recorded)):
                self._take_whole_parts()
                # In this order: killed in between, the set is still a finished one with parts missing.
                self._write_journal()
                (self.folder / MANIFEST_NAME).unlink()
            else:
                self._finished = ImageSet.open(self.folder)
                (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
            return
        if (self.folder / JOURNAL_NAME).is_file():
            self._find_parts(self._read_journal(), progress)
            self._take_whole_parts()
            return
        require_writable(self.folder)
        remove_leftovers(self.folder)
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise OutputError(f"{self.folder} is not empty and holds no image set; choose another folder or empty it")
        make_folder(self.folder)
        # Written before the first part: from now on the folder is known to be an unfinished set.
        self._write_journal()

    def _read_journal(self) -> Manifest:
        path = self.folder / JOURNAL_NAME
        try:
            return read_manifest_file(path)
        except DataError as error:
            raise DataError(f"{error}; without it, choose another folder or remove {self.folder}") from error

    def _find_parts(self, found: Manifest, progress: Progress) -> None:
        """Learn which parts of a former sitting are as they were written."""
        self._require_same(found)
        self._manifest = self._manifest.model_copy(update={"image_size": found.image_size})
        remove_leftovers(self.folder)
        self._recorded = found.parts
        for index, part in enumerate(found.parts):
            try:
                require_hash(self.folder / part.name, part.sha256)
            except DataError:
                progress.warn(f"{self.folder / part.name} is missing or not as it was written; it is made again")
            else:
                self._whole.add(index)

    def _take_whole_parts(self) -> None:
        """Go on behind the next parts, as long as they are there."""
        while (index := len(self._writer.parts)) in self._whole:
            self._writer.take(self._recorded[index], self._images_of(self._recorded[index]))

    def _images_of(self, part: Part) -> Iterator[Tensor]:
        rows = ParquetRows([PartFile(self.folder / part.name, part.count)])
        for start in range(0, part.count, _READ_TOGETHER):
            for stored in rows.fetch(range(start, min(start + _READ_TOGETHER, part.count))):
                yield pixels(stored)

    def _finished_parts(self) -> list[Part]:
        """All parts that are there, in order; they need not be the first ones."""
        later = sorted(index for index in self._whole if index >= len(self._writer.parts))
        return [*self._writer.parts, *(self._recorded[index] for index in later)]

    def _write_journal(self) -> None:
        # A part that is still missing stays in the journal as it was, and is found missing again after a kill.
        parts = (*self._writer.parts, *self._recorded[len(self._writer.parts) :])
        write_manifest_file(self.folder / JOURNAL_NAME, self._manifest.model_copy(update={"parts": parts}))

    def _require_same(self, found: Manifest) -> None:
        there, wanted = ({key: getattr(one, key) for key in _IDENTITY} for one in (found, self._manifest))
        if wanted["image_size"] is None:
            del there["image_size"], wanted["image_size"]
        if differing := differences(flat(there), flat(wanted), first=_IDENTITY):
            raise DataError(f"{self.folder} holds other images ({differing}); choose another folder or remove it")
