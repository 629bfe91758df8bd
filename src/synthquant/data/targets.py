"""What a network should have answered: class labels, or what else stands beside images, such as masks and boxes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.data.image_set import ImageSet

TARGET_COLUMN = "target"
"""Column of what a loader gives beside its images, where that is asked for."""


class Targets:
    """One target a sample."""

    def __init__(self, values: Sequence[Any] | Tensor) -> None:
        """Take one value a sample.

        Pictures, arrays and (nested) lists of numbers become tensors, also in dictionaries; dictionaries `{bytes,
        path}`, as `datasets` stores pictures, too. Where all values are tensors of one shape and type they are stacked.
        """
        self._values: Tensor | list[Any] = values if isinstance(values, Tensor) else [_value(value) for value in values]
        if not isinstance(self._values, Tensor):
            forms = {(one.shape, one.dtype) if isinstance(one, Tensor) else None for one in self._values}
            self._values = torch.stack(self._values) if len(forms) == 1 and None not in forms else self._values

    @classmethod
    def of(cls, images: ImageSet, column: str | None = None) -> Targets | None:
        """Return a column of a set, else its labels; none if it has none. Raises `DataError` without that column."""
        if column is not None:
            return cls(images.column(column))
        return None if images.labels is None else cls(images.labels)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._values)

    def at(self, indices: Sequence[int]) -> Tensor | list[Any]:
        """Targets of the samples at these positions: a tensor `[n, ...]` where they are stacked, else a list."""
        if isinstance(self._values, Tensor):
            return self._values[torch.tensor(list(indices), dtype=torch.int64)]
        return [self._values[index] for index in indices]

    @property
    def masks(self) -> Tensor | None:
        """Maps of class numbers, whole numbers `[N, H, W]`; none if the targets are something else."""
        values = self._values
        whole = isinstance(values, Tensor) and not values.is_floating_point() and values.dtype != torch.bool
        return values if isinstance(values, Tensor) and whole and values.ndim == 3 else None


def split_targets(targets: Any, count: int, several: bool, where: str) -> list[Any]:
    """Return what a loader gave beside `count` images, one value an image.

    Args:
        targets: of a batch a tensor or array `[count, ...]`, a dictionary or sequence of such, or a sequence of `count`
            values; or what one image has.
        count: how many images.
        several: whether they came as a batch.
        where: what to call them in messages.

    Raises:
        DataError: it cannot be told which part is of which image.
    """
    if not several:
        return [targets]
    if _is_batch(targets, count):
        return [targets[index] for index in range(count)]
    if isinstance(targets, Mapping) and targets and all(_is_batch(value, count) for value in targets.values()):
        return [{name: value[index] for name, value in targets.items()} for index in range(count)]
    if isinstance(targets, Sequence) and not isinstance(targets, str | bytes):
        each, together = len(targets) == count, bool(targets) and all(_is_batch(part, count) for part in targets)
        if each != together or count == 1:
            return list(targets) if each else [tuple(part[index] for part in targets) for index in range(count)]
    raise DataError(
        f"{where} has {count} images, and it cannot be told what of the targets beside them is of which; give a tensor"
        f" [{count}, ...], a dictionary of such, or a list of {count} dictionaries"
    )


def _is_batch(value: Any, count: int) -> bool:
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 0 and len(value) == count


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Image.Image):
        return torch.from_numpy(np.array(value))
    if isinstance(value, np.ndarray | np.generic | int | float):
        return torch.as_tensor(value)
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"} and isinstance(value["bytes"], bytes):
            return _value(Image.open(io.BytesIO(value["bytes"])))
        return {name: _value(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_value(part) for part in value)
    if isinstance(value, list):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError, RuntimeError):  # text, dictionaries, or rows of different lengths
            return [_value(part) for part in value]
    return value
