"""Parquet parts whose bytes depend on nothing but the images in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.files import sha256_bytes, write_bytes
from synthquant.data.codec import encode
from synthquant.data.manifest import Part
from synthquant.data.parts import open_parquet
from synthquant.data.pixels import IMAGE_COLUMN, LABEL_COLUMN
from synthquant.data.scan import ImageScan

_ROW_GROUP_BYTES = 8 * 2**20
_ROW_GROUP_ROWS = 1000
_IMAGE_FIELDS = [pa.field("bytes", pa.binary()), pa.field("path", pa.string())]


class PartsWriter:
    """Writes parts one after another into a folder and remembers what their manifest will say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[Part] = []
        self.scan = ImageScan()
        self._schema: pa.Schema | None = None

    @property
    def count(self) -> int:
        """Images written so far."""
        return sum(part.count for part in self.parts)

    def write(
        self,
        images: Sequence[Tensor],
        labels: Tensor | None,
        columns: Mapping[str, Sequence[Any]],
        *,
        encoded: Sequence[bytes] | None = None,
        names: Sequence[str] | None = None,
    ) -> Part:
        """Write images `[C,h,w]`, uint8 or float16, as one part, atomically, and return its entry in the manifest.

        `encoded` are the images' own bytes, if they have some. Raises `DataError` if a column cannot be stored or has
        another type than in the parts before, `OutputError` if the file cannot be written.
        """
        if encoded is None:
            encoded = [encode(image) for image in images]
        if names is None:
            suffix = "npy" if encoded and encoded[0].startswith(b"\x93NUMPY") else "png"
            names = [f"{self.count + place:08d}.{suffix}" for place in range(len(encoded))]
        table = _table(encoded, names, labels, columns)
        if self._schema is not None and not table.schema.equals(self._schema):
            raise DataError(f"columns differ from those of the parts before: {_fields(table.schema, self._schema)}")
        data = _parquet_bytes(table, _row_group_rows(encoded))
        name = f"part-{len(self.parts):05d}.parquet"
        write_bytes(self.folder / name, data)
        part = Part(name=name, count=len(images), sha256=sha256_bytes(data))
        self._schema = table.schema
        self.parts.append(part)
        self.scan.add(images)
        return part

    def take(self, part: Part, images: Iterable[Tensor]) -> None:
        """Go on after a part that is there, with these images, as if it had been written now."""
        if self._schema is None:
            self._schema = open_parquet(self.folder / part.name).schema_arrow
        self.parts.append(part)
        self.scan.add(images)

    def manifest_fields(self) -> dict[str, Any]:
        """Return the manifest's fields that follow from the images written."""
        report = self.scan.report()
        return {
            "count": self.count,
            "parts": tuple(self.parts),
            "statistics": self.scan.statistics(),
            "quality": report.model_dump(mode="json"),
            "image_size": self.scan.image_size,
            "dtype": self.scan.dtype,
        }


def _table(
    encoded: Sequence[bytes], names: Sequence[str], labels: Tensor | None, columns: Mapping[str, Sequence[Any]]
) -> pa.Table:
    # A label below 0 stands for none.
    label_values = [None] * len(encoded) if labels is None else [None if x < 0 else x for x in labels.tolist()]
    fields = {
        IMAGE_COLUMN: pa.StructArray.from_arrays(
            [pa.array(encoded, pa.binary()), pa.array(names, pa.string())], fields=_IMAGE_FIELDS
        ),
        LABEL_COLUMN: pa.array(label_values, pa.int64()),
    }
    for name in sorted(columns):
        try:
            fields[name] = pa.array(columns[name])
        except pa.ArrowException as error:
            raise DataError(f"column {name!r} cannot be stored: {error}") from error
    return pa.table(fields)


def _parquet_bytes(table: pa.Table, row_group_rows: int) -> memoryview:
    sink = pa.BufferOutputStream()
    # What changes the bytes is fixed here. Compression gains nothing on PNG and little on noise.
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        version="2.6",
        compression="NONE",
        use_dictionary=False,
        write_statistics=False,
        store_schema=True,
    )
    return memoryview(sink.getvalue())


def _row_group_rows(images: Sequence[bytes]) -> int:
    # Small enough that reading one image out of a set does not mean reading much of it.
    mean_bytes = max(1, sum(len(image) for image in images) // max(1, len(images)))
    return max(1, min(_ROW_GROUP_ROWS, _ROW_GROUP_BYTES // mean_bytes))


def _fields(new: pa.Schema, old: pa.Schema) -> str:
    def listed(schema: pa.Schema) -> str:
        return ", ".join(f"{field.name} {field.type}" for field in schema if field.name != IMAGE_COLUMN)

    return f"{listed(new)} after {listed(old)}"
