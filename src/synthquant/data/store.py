"""Writing an image set while it is being made, so that a killed run continues from its last finished part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from synthquant.core.errors import DataError, InputError, OutputError
from synthquant.core.files import make_folder, read_json, require_writable, sha256_file, write_json
from synthquant.core.locks import remove_leftovers
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings, parse_settings
from synthquant.data.image_set import ImageSet
from synthquant.data.manifest import MANIFEST_NAME, Framing, ImageDtype, Manifest, Part, read_manifest, write_manifest
from synthquant.data.part_writer import PartsWriter
from synthquant.data.parts import ParquetRows, PartFile
from synthquant.data.pixels import checked_columns, checked_labels, stored_pixels
from synthquant.data.reading import pixels

JOURNAL_NAME = "parts.json"

_READ_TOGETHER = 256
_IDENTITY = {
    "method": "method",
    "settings": "settings",
    "seed": "seed",
    "model_fingerprint": "model fingerprint",
    "count": "count",
    "image_size": "image size",
    "dtype": "pixel type",
    "framing": "framing",
}


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
    and ends with the same bytes as an uninterrupted run. Opened on a finished set, it has nothing left to do.
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
    ) -> None:
        """Open a new, an unfinished or a finished folder. Without `image_size` the first images say it.

        Raises `DataError` if the folder holds images made in another way or is damaged, `OutputError` if it holds other
        things or cannot be written.
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
        self._writer = self._open()

    @property
    def finished_parts(self) -> int:
        """Parts that need not be made again."""
        return len(self._writer.parts)

    @property
    def finished_count(self) -> int:
        """Images in those parts."""
        return self._writer.count

    def append(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        columns: Mapping[str, Sequence[Any] | Tensor] | None = None,
    ) -> None:
        """Write images `[n,3,H,W]` (uint8, or floats in pixel space) as exactly one part.

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
        self._write_journal()

    def written(self) -> ImageSet | None:
        """Return the images of the finished parts; none before the first."""
        parts = self._writer.parts
        if not parts:
            return None
        rows = ParquetRows([PartFile(self.folder / part.name, part.count) for part in parts])
        return ImageSet(rows, self._manifest.model_copy(update={"count": self.finished_count, "parts": tuple(parts)}))

    def finish(self, progress: Progress = QUIET, redrawn: Mapping[str, int] | None = None) -> ImageSet:
        """Write the manifest, warn about suspicious images and return the set.

        `redrawn` is how many images the method made and did not take, by reason. Raises `DataError` if images are
        missing.
        """
        if self._finished is None:
            if self.finished_count != self.target_count:
                raise DataError(f"{self.folder} has {self.finished_count} of {self.target_count} images")
            fields = {**self._writer.manifest_fields(), "redrawn": dict(redrawn or {})}
            write_manifest(self.folder, self._manifest.model_copy(update=fields))
            (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
            for warning in self._writer.scan.report().warnings():
                progress.warn(f"{self.folder}: {warning}")
            self._finished = ImageSet.open(self.folder)
        return self._finished

    def _open(self) -> PartsWriter:
        if self.folder.is_dir():
            if (self.folder / MANIFEST_NAME).is_file():
                found = read_manifest(self.folder)
                self._require_same(found)
                self._finished = ImageSet.open(self.folder)
                (self.folder / JOURNAL_NAME).unlink(missing_ok=True)
                return PartsWriter(self.folder, found.parts)
            if (self.folder / JOURNAL_NAME).is_file():
                return self._resume()
        require_writable(self.folder)
        remove_leftovers(self.folder)
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise OutputError(f"{self.folder} is not empty and holds no image set; choose another folder or empty it")
        make_folder(self.folder)
        writer = PartsWriter(self.folder)
        # Written before the first part: from now on the folder is known to be an unfinished set.
        self._write_journal(writer)
        return writer

    def _resume(self) -> PartsWriter:
        path = self.folder / JOURNAL_NAME
        try:
            found = parse_settings(Manifest, read_json(path), str(path))
        except (InputError, TypeError) as error:
            raise DataError(f"{path} is damaged, remove {self.folder} and start again: {error}") from error
        self._require_same(found)
        self._manifest = self._manifest.model_copy(update={"image_size": found.image_size})
        remove_leftovers(self.folder)
        for part in found.parts:
            file = self.folder / part.name
            if not file.is_file() or sha256_file(file) != part.sha256:
                raise DataError(f"{file} is missing or damaged, remove {self.folder} and start again")
        writer = PartsWriter(self.folder, found.parts)
        # Statistics go over all images, also over those of the former sitting.
        for part in found.parts:
            rows = ParquetRows([PartFile(self.folder / part.name, part.count)])
            for start in range(0, part.count, _READ_TOGETHER):
                stored = rows.fetch(range(start, min(start + _READ_TOGETHER, part.count)))
                writer.scan.add(pixels(one) for one in stored)
        return writer

    def _write_journal(self, writer: PartsWriter | None = None) -> None:
        parts: tuple[Part, ...] = tuple((writer or self._writer).parts)
        journal = self._manifest.model_copy(update={"parts": parts})
        write_json(self.folder / JOURNAL_NAME, journal.model_dump(mode="json"))

    def _require_same(self, found: Manifest) -> None:
        for name, what in _IDENTITY.items():
            there, wanted = getattr(found, name), getattr(self._manifest, name)
            if name == "image_size" and wanted is None:
                continue
            if there != wanted:
                raise DataError(
                    f"{self.folder} holds images made with {what} {there!r}, not {wanted!r}; "
                    "choose another folder or remove it"
                )
