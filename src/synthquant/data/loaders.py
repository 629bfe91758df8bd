"""Images that a user's own loader gives, read once into a set: a loader may give others each time, a set does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.data.codec import rgb
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess

_IMAGE_KEYS = ("image", "images", "img", "pixel_values")
_LABEL_KEYS = ("label", "labels")
_COLOURS = (1, 3, 4)
# Beyond black and white by so much is no rounding of a normalisation that is undone.
_SLACK = 0.01


def read_loader(
    loader: Iterable[Any] | Any, *, count: int | None = None, preprocess: Preprocess | None = None
) -> ImageSet:
    """Read a `DataLoader`, a `Dataset` or any other iterable once, and return its images as a set in memory.

    Args:
        loader: gives batches `[B, C, H, W]` or images `[C, H, W]`, uint8 or floats in 0..1, or Pillow's images; by
            themselves, first in a tuple, or in a dictionary as `image`, `images`, `img` or `pixel_values`. Whole
            numbers beside them, second in a tuple, or as `label` or `labels`, are labels; all else is left out.
        count: how many images to read; none: all.
        preprocess: how the loader has normalised them, which is undone. None: it has not.

    Returns:
        uint8 images, which a network resizes where they have another size than it takes.

    Raises:
        DataError: the loader gives no images, some of another shape, or values that are no pixels.
    """
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    read, lowest = 0, 0.0
    for number, item in enumerate(_items(loader)):
        where = f"item {number} of the loader"
        images, own = _parts(item)
        batch, several = _batch(images, where)
        if parts and batch.shape[1:] != parts[0].shape[1:]:
            raise DataError(
                f"{where} has images {list(batch.shape[1:])}, those before {list(parts[0].shape[1:])}; resize them to"
                " one size in the loader"
            )
        known = _labels(own, len(batch), several, where)
        taken = len(batch) if count is None else min(len(batch), count - read)
        if taken:
            lowest = min(lowest, float(batch[:taken].amin()))
            parts.append(_uint8(batch[:taken], preprocess, where))
            labels.append(known[:taken])
            read += taken
        if read == count:
            break
    if not read:
        raise DataError("the loader gives no images; it was read to its end already, or holds none")
    if preprocess is not None and lowest >= 0:
        raise DataError("no image of the loader has a value below 0, as normalised ones have; leave preprocess out")
    found = torch.cat(labels)
    return ImageSet.from_tensors(torch.cat(parts), found if bool((found >= 0).any()) else None)


def _items(loader: Any) -> Iterator[Any]:
    """What a loader gives; a map-style `Dataset` has a length and no end of its own."""
    if hasattr(loader, "__iter__") and not isinstance(loader, str | bytes | Mapping):
        yield from loader
    elif hasattr(loader, "__getitem__") and hasattr(loader, "__len__") and not isinstance(loader, str | bytes):
        yield from (loader[index] for index in range(len(loader)))
    else:
        raise DataError(f"a {type(loader).__name__} is no loader; give a DataLoader, a Dataset, or open_images a path")


def _parts(item: Any) -> tuple[Any, Any]:
    """The images of one item, and what may be their labels."""
    if isinstance(item, Mapping):
        images = next((item[key] for key in _IMAGE_KEYS if key in item), None)
        return images, next((item[key] for key in _LABEL_KEYS if key in item), None)
    if isinstance(item, Sequence) and item and not isinstance(item, str | bytes):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _batch(images: Any, where: str) -> tuple[Tensor, bool]:
    """Images `[B, C, H, W]`, and whether the item was a batch of them."""
    if isinstance(images, Image.Image):
        return torch.from_numpy(rgb(images).copy()).permute(2, 0, 1)[None], False
    if not isinstance(images, Tensor):
        raise DataError(
            f"{where} has a {type(images).__name__} where images are expected: give tensors or Pillow's images, alone,"
            f" first in a tuple, or as one of {', '.join(_IMAGE_KEYS)} in a dictionary"
        )
    shape = list(images.shape)
    if images.ndim not in (3, 4) or 0 in shape[-3:]:
        raise DataError(f"{where} has images of shape {shape}; give [B, channels, H, W] or [channels, H, W]")
    if shape[-3] not in _COLOURS and shape[-1] in _COLOURS:
        raise DataError(f"{where} has images of shape {shape} with the channels last; give [B, channels, H, W]")
    return (images if images.ndim == 4 else images[None]).detach().cpu(), images.ndim == 4


def _labels(labels: Any, count: int, several: bool, where: str) -> Tensor:
    """int64 `[count]`, -1 where there is none."""
    if isinstance(labels, int) and not isinstance(labels, bool):
        labels = torch.tensor(labels)
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim > 1 or labels.dtype == torch.bool:
        return torch.full((count,), -1)
    if not several and labels.ndim == 1 and len(labels) > 1:
        raise DataError(f"{where} has {len(labels)} labels and one image [channels, H, W]; give [B, channels, H, W]")
    if labels.numel() != count:
        raise DataError(f"{where} has {labels.numel()} labels for {count} images")
    return labels.detach().cpu().to(torch.int64).reshape(count)


def _uint8(batch: Tensor, preprocess: Preprocess | None, where: str) -> Tensor:
    """Pixels in 0..255 of what the loader gives; raises `DataError` for values that are none."""
    if batch.dtype == torch.uint8:
        return batch
    if not batch.is_floating_point():
        raise DataError(f"{where} has {batch.dtype} images; give uint8, or floats in 0..1")
    if preprocess is not None and batch.shape[1] != preprocess.channels:
        raise DataError(f"{where} has images of {batch.shape[1]} channels, and preprocess is for {preprocess.channels}")
    pixels = batch.float() if preprocess is None else preprocess.pixels(batch.float())
    low, high = float(pixels.amin()), float(pixels.amax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # nor is one that is not a number
        advice = (
            "divide them by 255, or, if the loader normalises them, give preprocess, with its mean and deviation"
            if preprocess is None
            else "they were not normalised by that preprocess"
        )
        raise DataError(f"{where} has values from {low:.3g} to {high:.3g}, and pixels lie in 0..1: {advice}")
    return pixels.clamp(0, 1).mul(255).round().to(torch.uint8)
