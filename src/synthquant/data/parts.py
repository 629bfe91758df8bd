"""Images in Parquet files: any of them on demand, few of them in memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.files import sha256_bytes, sha256_file
from synthquant.data.columns import label_numbers, stored_image
from synthquant.data.pixels import IMAGE_COLUMN, LABEL_COLUMN
from synthquant.data.rows import Stored

_CACHE_BYTES = 256 * 2**20
_OPEN_FILES = 32


@dataclass(frozen=True)
class PartFile:
    """A Parquet file and how many images it is known to hold."""

    path: Path
    """The file."""
    count: int
    """Its rows."""


class ParquetRows:
    """Images in Parquet files; row groups are read when asked for and the last few are kept.

    Where hashes are known, a file is held against its own when it is first opened, once.
    """

    def __init__(
        self,
        files: Sequence[PartFile],
        *,
        image_column: str = IMAGE_COLUMN,
        label_column: str | None = LABEL_COLUMN,
        known_hashes: Sequence[str] | None = None,
    ) -> None:
        self._files = list(files)
        self._image_column = image_column
        self._label_column = label_column
        self._known_hashes = known_hashes
        self._unverified = set(range(len(self._files) if known_hashes else 0))
        self._starts = [0, *accumulate(file.count for file in files)]
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._group_starts: dict[int, list[int]] = {}
        self._cache: OrderedDict[tuple[int, int], pa.Array] = OrderedDict()

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the columns besides image and label."""
        if not self._files:
            return ()
        names = self._file(0).schema_arrow.names
        return tuple(name for name in names if name not in (self._image_column, self._label_column))

    def __len__(self) -> int:
        return self._starts[-1]

    def labels(self) -> Tensor | None:
        """Return int64 `[N]` with -1 where a label is missing; none if all are. Raises `DataError` on other types."""
        if self._label_column is None or not self._files:
            return None
        values = self._read_column(self._label_column)
        return label_numbers(values, f"column {self._label_column!r} in {self._files[0].path}")

    def column(self, name: str) -> list[Any]:
        """Return all values of a column."""
        values: list[Any] = self._read_column(name).to_pylist()
        return values

    def fetch(self, indices: Sequence[int]) -> list[Stored]:
        """Return the images at these positions, in this order; each row group is read at most once."""
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            file, group, row = self._locate(index)
            wanted.setdefault((file, group), []).append((place, row))
        found: dict[int, Stored] = {}
        for (file, group), places in wanted.items():
            images = self._row_group(file, group)
            for place, row in places:
                found[place] = self._stored(images[row], file, indices[place] - self._starts[file])
        return [found[place] for place in range(len(indices))]

    def fingerprint(self) -> str:
        """Return a hash over all files."""
        hashes = self._known_hashes
        if hashes is None:
            hashes = [sha256_file(file.path) for file in self._files]
        return sha256_bytes("\n".join(hashes).encode())

    def _stored(self, image: pa.Scalar, file: int, row: int) -> Stored:
        path = self._files[file].path
        return stored_image(image, path.parent, f"{path.name} row {row}")

    def _locate(self, index: int) -> tuple[int, int, int]:
        file = bisect_right(self._starts, index) - 1
        starts = self._group_starts.get(file)
        if starts is None:
            metadata = self._file(file).metadata
            starts = [0, *accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))]
            self._group_starts[file] = starts
        row = index - self._starts[file]
        group = bisect_right(starts, row) - 1
        return file, group, row - starts[group]

    def _row_group(self, file: int, group: int) -> pa.Array:
        key = (file, group)
        if key not in self._cache:
            try:
                table = self._file(file).read_row_group(group, columns=[self._image_column])
            except (pa.ArrowException, OSError) as error:
                raise _damaged(self._files[file].path, error) from error
            self._cache[key] = table.column(0).combine_chunks()
            while len(self._cache) > 1 and sum(array.nbytes for array in self._cache.values()) > _CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _read_column(self, name: str) -> pa.ChunkedArray:
        chunks = []
        for number, file in enumerate(self._files):
            try:
                chunks.append(self._file(number).read(columns=[name]).column(name))
            except (pa.ArrowException, OSError) as error:
                raise _damaged(file.path, error) from error
            except KeyError:
                raise DataError(f"{file.path} has no column {name!r}, which {self._files[0].path.name} has") from None
        try:
            return pa.chunked_array([piece for chunk in chunks for piece in chunk.chunks], type=chunks[0].type)
        except pa.ArrowException as error:
            raise DataError(f"column {name!r} has different types in {file.path.parent}: {error}") from error

    def _file(self, number: int) -> pq.ParquetFile:
        if number not in self._open:
            known = self._files[number]
            if number in self._unverified and self._known_hashes is not None:
                require_hash(known.path, self._known_hashes[number])
                self._unverified.remove(number)
            file = open_parquet(known.path)
            if file.metadata.num_rows != known.count:
                raise DataError(f"{known.path} has {file.metadata.num_rows} rows where {known.count} are expected")
            self._open[number] = file
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file; raises `DataError` if it is missing or damaged."""
    if not path.is_file():
        raise DataError(f"{path} is missing; make the image set again")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def require_hash(path: Path, sha256: str) -> None:
    """Raise `DataError` if a part is missing or is not the file that was written."""
    if not path.is_file():
        raise DataError(f"{path} is missing; make the image set again")
    try:
        found = sha256_file(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if found != sha256:
        raise DataError(
            f"{path} is damaged: its hash differs from the manifest; restore it, or let the command that made the set"
            " make it again"
        )


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged or not a Parquet file: {error}")
