"""Where a set's images lie: in memory or in single files. Parquet files are in `parts.py`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.data.folders import printable


@dataclass(frozen=True)
class Stored:
    """An image as it is stored."""

    name: str
    """Path, or place in the set."""
    content: bytes | Path | Tensor
    """Encoded bytes, a file, or the pixels themselves."""


class Rows(Protocol):
    """A table of images that gives out any of them and keeps few of them in memory."""

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns besides image and label."""

    def __len__(self) -> int: ...

    def labels(self) -> Tensor | None:
        """Return int64 `[N]` with -1 where a label is missing; none if all are."""

    def column(self, name: str) -> list[Any]:
        """Return all values of a column."""

    def fetch(self, indices: Sequence[int]) -> list[Stored]:
        """Return the images at these positions, in this order."""

    def fingerprint(self) -> str:
        """Return a hash that changes when the images change."""


class MemoryRows:
    """Images in one tensor `[N,C,H,W]`, or in one each where sizes differ; uint8 or float16."""

    def __init__(
        self, images: Tensor | Sequence[Tensor], labels: Tensor | None, columns: Mapping[str, list[Any]]
    ) -> None:
        self._images = images
        self._labels = labels
        self._columns = dict(columns)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns besides image and label."""
        return tuple(self._columns)

    def __len__(self) -> int:
        return len(self._images)

    def labels(self) -> Tensor | None:
        """Return int64 `[N]`, or none."""
        return self._labels

    def column(self, name: str) -> list[Any]:
        """Return all values of a column."""
        return self._columns[name]

    def fetch(self, indices: Sequence[int]) -> list[Stored]:
        """Return the images at these positions, in this order."""
        return [Stored(f"image {index}", self._images[index]) for index in indices]

    def fingerprint(self) -> str:
        """Return a hash of pixels, labels and columns."""
        if isinstance(self._images, Tensor):
            form = f"{tuple(self._images.shape)} {self._images.dtype}"
        else:
            form = " ".join(f"{tuple(image.shape)} {image.dtype}" for image in self._images)
        digest = hashlib.sha256(form.encode())
        for image in self._images:  # one at a time: a contiguous copy of all may not fit
            digest.update(image.contiguous().numpy().tobytes())
        digest.update(b"" if self._labels is None else self._labels.numpy().tobytes())
        digest.update(repr(sorted(self._columns.items())).encode())
        return digest.hexdigest()


class DetachedRows:
    """A few images as they are stored, with their bytes; no labels and no columns."""

    def __init__(self, stored: Sequence[Stored]) -> None:
        self._stored = list(stored)

    @property
    def column_names(self) -> tuple[str, ...]:
        """There are no columns."""
        return ()

    def __len__(self) -> int:
        return len(self._stored)

    def labels(self) -> Tensor | None:
        """There are no labels."""
        return None

    def column(self, name: str) -> list[Any]:
        """Raise `DataError`: there are no columns."""
        raise DataError(f"detached images have no column {name!r}")

    def fetch(self, indices: Sequence[int]) -> list[Stored]:
        """Return the images at these positions, in this order."""
        return [self._stored[index] for index in indices]

    def fingerprint(self) -> str:
        """Return a hash of names and contents."""
        digest = hashlib.sha256()
        for one in self._stored:
            content = one.content.numpy().tobytes() if isinstance(one.content, Tensor) else one.content
            digest.update(one.name.encode() + (content if isinstance(content, bytes) else str(content).encode()))
        return digest.hexdigest()


class FileRows:
    """Image files below a folder; only their names are kept."""

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int] | None) -> None:
        self._root = root
        # As bytes, for names need not be text; a third of the memory of a list of strings.
        self._names = pa.array([os.fsencode(name) for name in names], pa.large_binary())
        self._labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)

    @property
    def column_names(self) -> tuple[str, ...]:
        """Files have no further columns."""
        return ()

    def __len__(self) -> int:
        return len(self._names)

    def labels(self) -> Tensor | None:
        """Return int64 `[N]`, or none for a folder without class folders."""
        return self._labels

    def column(self, name: str) -> list[Any]:
        """Raise `DataError`: files have no further columns."""
        raise DataError(f"{self._root} is a folder of images and has no column {name!r}")

    def fetch(self, indices: Sequence[int]) -> list[Stored]:
        """Return the files at these positions, in this order."""
        names = [os.fsdecode(self._names[index].as_py()) for index in indices]
        return [Stored(printable(name), self._root / name) for name in names]

    def fingerprint(self) -> str:
        """Return a hash of names and sizes; contents are not read."""
        digest = hashlib.sha256()
        for name in self._names.to_pylist():
            try:
                size = str((self._root / os.fsdecode(name)).stat().st_size)
            except OSError:  # gone, or not to be read: that is said when it is read
                size = "none"
            digest.update(name + f" {size}\n".encode())
        return digest.hexdigest()
