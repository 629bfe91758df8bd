"""What callers hand over as images, labels and columns, brought into the form that is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.data.manifest import ImageDtype

IMAGE_COLUMN = "image"
LABEL_COLUMN = "label"


def stored_pixels(images: Tensor, dtype: ImageDtype | None = None) -> Tensor:
    """Return images `[N,C,H,W]` in the pixel type they are stored in, on the CPU.

    uint8 stays (or becomes float16 in 0..1); floats become float16 if any value leaves 0..1, else uint8, unless `dtype`
    decides (uint8 clamps). Raises `DataError` on other shapes or types.
    """
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise DataError(f"images must have shape [N, channels, height, width], got {list(images.shape)}")
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return (images.float() / 255).half() if dtype == "float16" else images
    if not images.is_floating_point():
        raise DataError(f"images must be uint8 or floats in 0..1, got {images.dtype}")
    if dtype is None:
        # NaN fails both comparisons and so is kept, to be found by the quality checks.
        inside = bool(((images >= 0) & (images <= 1)).all())
        dtype = "uint8" if inside else "float16"
    if dtype == "float16":
        return images.half()
    return images.float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)


def checked_labels(labels: Tensor, count: int) -> Tensor:
    """Return labels as int64 `[count]` on the CPU; raises `DataError` on other shapes or types."""
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"labels must be {count} whole numbers, one an image, got {labels.dtype} of shape {list(labels.shape)}"
        )
    return labels.detach().cpu().to(torch.int64)


def checked_columns(columns: Mapping[str, Sequence[Any] | Tensor] | None, count: int) -> dict[str, list[Any]]:
    """Return columns as lists of `count` values; raises `DataError` on a wrong length or a reserved name."""
    checked: dict[str, list[Any]] = {}
    for name, values in (columns or {}).items():
        if name in (IMAGE_COLUMN, LABEL_COLUMN):
            raise DataError(f"column name {name!r} is reserved; choose another")
        checked[name] = values.detach().cpu().tolist() if isinstance(values, Tensor) else list(values)
        if len(checked[name]) != count:
            raise DataError(f"column {name!r} has {len(checked[name])} values for {count} images")
    return checked
