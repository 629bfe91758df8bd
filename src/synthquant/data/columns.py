"""Columns of Parquet files as images and labels, or one line that says why they are none."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.data.folders import printable
from synthquant.data.rows import Stored

_LABEL_ADVICE = "labels are whole numbers from 0 on"


def require_images(type_: pa.DataType, where: str) -> None:
    """Raise `DataError` unless a column of this type can hold images: bytes, or a struct of `bytes` and `path`."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if _holds_bytes(type_):
        return
    if pa.types.is_struct(type_):
        fields = {field.name: field.type for field in type_}
        known = [
            fields.get("bytes") is not None and (_holds_bytes(fields["bytes"]) or pa.types.is_null(fields["bytes"])),
            fields.get("path") is not None and (_holds_text(fields["path"]) or pa.types.is_null(fields["path"])),
        ]
        if any(known) and all(known[place] for place, name in enumerate(("bytes", "path")) if name in fields):
            return
    raise DataError(f"{where} holds {type_}; images are bytes, or structs of bytes and path")


def stored_image(image: pa.Scalar, folder: Path, name: str) -> Stored:
    """Return the image of a cell; `name` is its own where the cell has none, and paths start at `folder`."""
    if isinstance(image, pa.DictionaryScalar):
        image = image.value
    if not image.is_valid:
        return Stored(name, b"")
    if not isinstance(image, pa.StructScalar):
        return Stored(name, image.as_py() or b"")
    content = image["bytes"].as_py() if "bytes" in image else None
    try:
        path = image["path"].as_py() if "path" in image else None
    except UnicodeDecodeError:  # Arrow does not check what a file calls text
        path = None
    if content is None and path:  # files that only point at images
        return Stored(printable(path), folder / path)
    return Stored(printable(path) if path else name, content or b"")


def label_numbers(values: pa.ChunkedArray | pa.Array, where: str) -> Tensor | None:
    """Return a column as labels, int64 `[N]` with -1 where one is missing; none if all are.

    Raises `DataError` for other types than whole numbers, and for numbers that no tensor holds.
    """
    if values.null_count == len(values):
        return None
    if not pa.types.is_integer(values.type):
        raise DataError(f"{where} holds {values.type}; {_LABEL_ADVICE}")
    try:
        numbers = values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"{where} holds numbers beyond 2^63; {_LABEL_ADVICE}") from error
    return torch.from_numpy(numbers.fill_null(-1).to_numpy().copy())


def _holds_bytes(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(is_kind(type_) for is_kind in kinds)


def _holds_text(type_: pa.DataType) -> bool:
    return any(is_kind(type_) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
