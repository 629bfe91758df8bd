"""Images that a program has in its hands, read once into a set: a loader may give others each time, a set does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.data.codec import rgb
from synthquant.data.image_set import ImageSet
from synthquant.data.manifest import Manifest
from synthquant.data.preprocess import Preprocess
from synthquant.data.rows import MemoryRows
from synthquant.data.targets import TARGET_COLUMN, split_targets

_IMAGE_KEYS = ("image", "images", "img", "pixel_values")
_LABEL_KEYS = ("label", "labels")
_TARGET_KEYS = ("target", "targets")
_COLOURS = (1, 3, 4)
# Beyond black and white by so much is no rounding of a normalisation that is undone.
_SLACK = 0.01


def read_loader(
    loader: Iterable[Any] | Any,
    *,
    count: int | None = None,
    preprocess: Preprocess | None = None,
    targets: bool = False,
) -> ImageSet:
    """Read a `DataLoader`, a `Dataset`, a tensor, a list or any other iterable once; its images become a set in memory.

    Args:
        loader: gives batches `[B, C, H, W]` or images `[C, H, W]`, uint8 or floats in 0..1, or pictures: Pillow's
            images, or arrays `[H, W]` and `[H, W, C]`; by themselves, first in a tuple, or in a dictionary as `image`,
            `images`, `img` or `pixel_values`. Whole numbers beside them, second in a tuple, or as `label` or `labels`,
            are labels; all else is left out. Or one tensor or array of all images (`[N, C, H, W]`, `[N, H, W, C]`),
            or such a one and its labels in a tuple.
        count: how many images to read; none: all.
        preprocess: how the loader has normalised them, which is undone. None: it has not.
        targets: keep what stands beside images and is no label, such as masks or boxes, as the column `target`: a
            metric is given that. In a dictionary `target` or `targets`, else all that is not the images.

    Returns:
        uint8 images, which a network resizes where they have another size than it takes. Pictures of several sizes are
        resized and cropped as a file's would be.

    Raises:
        DataError: the loader gives no images, some of another shape, or values that are no pixels; or it cannot be told
            which target is of which image.
    """
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    beside: list[Any] = []
    read, lowest = 0, 0.0
    pair = _is_pair(loader, targets=targets)
    for number, item in enumerate([loader] if pair else _items(loader)):
        where = "the tensor of images" if _is_array(loader) or pair else f"item {number} of the loader"
        images, own = _parts(item)
        batch, several = _batch(images, where)
        if parts and batch.shape[1:] != parts[0].shape[1:] and not (_is_picture(images) and len(batch) == 1):
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
            aside = _target(item, own, known) if targets else None
            if aside is not None:
                beside += split_targets(aside, len(batch), several, where)[:taken]
            read += taken
        if read == count:
            break
    if not read:
        raise DataError("the loader gives no images; it was read to its end already, or holds none")
    if preprocess is not None and lowest >= 0:
        raise DataError("no image of the loader has a value below 0, as normalised ones have; leave preprocess out")
    found = torch.cat(labels)
    known_labels = found if bool((found >= 0).any()) else None
    if beside and len(beside) != read:
        raise DataError(f"the loader gives targets for {len(beside)} of {read} images; give one for each")
    columns = {TARGET_COLUMN: beside} if beside else {}
    if len({part.shape[1:] for part in parts}) == 1:
        return ImageSet.from_tensors(torch.cat(parts), known_labels, columns=columns)
    pictures = [image for part in parts for image in part]
    return ImageSet(MemoryRows(pictures, known_labels, columns), Manifest(count=len(pictures), framing="raw"))


def _items(loader: Any) -> Iterator[Any]:
    """What a loader gives; a map-style `Dataset` has a length and no end of its own."""
    if _is_array(loader):
        if loader.ndim != 4:
            raise DataError(
                f"a {type(loader).__name__} of shape {list(loader.shape)} is no set of images; give [N, channels, H, W]"
                " (of an array [N, H, W, channels]), with unsqueeze(1) where there are no channels yet"
            )
        yield loader
    elif isinstance(loader, str | bytes | Mapping) or not (hasattr(loader, "__iter__") or _is_map_style(loader)):
        raise DataError(f"a {type(loader).__name__} is no loader; give a DataLoader, a Dataset, or open_images a path")
    else:
        yield from loader if hasattr(loader, "__iter__") else (loader[index] for index in range(len(loader)))


def _is_map_style(loader: Any) -> bool:
    return hasattr(loader, "__getitem__") and hasattr(loader, "__len__")


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image | np.ndarray)


def _is_pair(loader: Any, *, targets: bool) -> bool:
    """Whether this is one batch of images with its labels (or `targets`), and not a sequence of two images."""
    if not isinstance(loader, tuple) or len(loader) != 2 or not all(_is_array(part) for part in loader):
        return False
    images, labels = loader
    return bool(images.ndim == 4 and (labels.ndim == 1 or (targets and len(images) == len(labels))))


def _parts(item: Any) -> tuple[Any, Any]:
    """The images of one item, and what may be their labels."""
    if isinstance(item, Mapping):
        images = next((item[key] for key in _IMAGE_KEYS if key in item), None)
        return images, next((item[key] for key in _LABEL_KEYS if key in item), None)
    if isinstance(item, Sequence) and item and not isinstance(item, str | bytes):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _target(item: Any, own: Any, known: Tensor) -> Any:
    """What else than labels stands beside the images of an item; none if nothing does."""
    if isinstance(item, Mapping):
        named = next((item[key] for key in _TARGET_KEYS if key in item), None)
        if named is not None:
            return named
        if own is None:
            rest = {key: value for key, value in item.items() if key not in _IMAGE_KEYS}
            return next(iter(rest.values())) if len(rest) == 1 else rest or None
    return None if bool((known >= 0).any()) else own


def _batch(images: Any, where: str) -> tuple[Tensor, bool]:
    """Images `[B, C, H, W]`, and whether the item was a batch of them."""
    if isinstance(images, Image.Image):
        return torch.from_numpy(rgb(images).copy()).permute(2, 0, 1)[None], False
    if isinstance(images, np.ndarray):
        return _array_batch(images, where)
    if not isinstance(images, Tensor):
        raise DataError(
            f"{where} has a {type(images).__name__} where images are expected: give tensors, arrays or Pillow's images,"
            f" alone, first in a tuple, or as one of {', '.join(_IMAGE_KEYS)} in a dictionary"
        )
    shape = list(images.shape)
    if images.ndim not in (3, 4) or 0 in shape[-3:]:
        raise DataError(f"{where} has images of shape {shape}; give [B, channels, H, W] or [channels, H, W]")
    if shape[-3] not in _COLOURS and shape[-1] in _COLOURS:
        raise DataError(f"{where} has images of shape {shape} with the channels last; give [B, channels, H, W]")
    return (images if images.ndim == 4 else images[None]).detach().cpu(), images.ndim == 4


def _array_batch(images: np.ndarray[Any, Any], where: str) -> tuple[Tensor, bool]:
    """Arrays, whose channels are last as in Pillow and OpenCV, as `_batch` gives images."""
    shape = list(images.shape)
    grey = images[..., None] if images.ndim == 2 else images
    if grey.ndim not in (3, 4) or 0 in shape or grey.shape[-1] not in _COLOURS:
        first = len(shape) > 2 and shape[-3] in _COLOURS
        raise DataError(
            f"{where} is an array of shape {shape}; give [H, W] or [H, W, channels]"
            + (", or a tensor (torch.from_numpy), whose channels are first" if first else "")
        )
    tensor = torch.from_numpy(np.ascontiguousarray(grey)).movedim(-1, -3)
    return (tensor, True) if tensor.ndim == 4 else (tensor[None], False)


def _labels(labels: Any, count: int, several: bool, where: str) -> Tensor:
    """int64 `[count]`, -1 where there is none."""
    if isinstance(labels, int | np.integer) and not isinstance(labels, bool):
        labels = torch.tensor(int(labels))
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu":
        labels = torch.from_numpy(labels.astype(np.int64))
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
        advice = "they were not normalised by that preprocess"
        if preprocess is None:
            advice = (
                "divide them by 255, or, if the loader normalises them, give preprocess, with its mean and deviation"
                " (to a verb such as quantize normalized=True, if that is how the network wants them)"
            )
        raise DataError(f"{where} has values from {low:.3g} to {high:.3g}, and pixels lie in 0..1: {advice}")
    return pixels.clamp(0, 1).mul(255).round().to(torch.uint8)
