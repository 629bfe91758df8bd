"""Contact sheets: a few images of a set as thumbnails inside the page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess

SHEET_SIZE = 30
_LARGEST_SIDE = 128
_LOSSLESS_SIDE = 64


@dataclass(frozen=True)
class Thumbnail:
    """One image of a sheet."""

    uri: str
    """The image as a `data:` URI."""
    caption: str
    """Class name, class number, or nothing."""
    pixelated: bool
    """Whether the image is so small that it is shown enlarged, pixel by pixel."""


@dataclass(frozen=True)
class Sheet:
    """Some images of a set, ordered by class."""

    thumbnails: tuple[Thumbnail, ...]
    total: int
    """Images in the set."""
    clipped: float
    """Share (0..1) of the pixel values shown that lie outside 0..1 and were cut off for display."""
    classes: tuple[int, ...]
    """Class numbers on the sheet, without repetition."""
    channels: str = ""
    """How images that are neither grey nor in colour are shown; empty: as they are."""


def make_sheet(
    images: ImageSet,
    preprocess: Preprocess | None,
    class_names: Sequence[str] = (),
    *,
    count: int = SHEET_SIZE,
    classes: Sequence[int] = (),
) -> Sheet:
    """Pick `count` readable images, spread over the classes, as a network would see them.

    Args:
        images: the set; the pick depends only on its length and labels.
        preprocess: crops and scales images that are not cropped yet; none: they are shown whole.
        class_names: names for the captions.
        count: how many; fewer if the set is smaller.
        classes: prefer these classes (those of the sheet beside it).

    Raises:
        DataError: none of the images picked could be read.
    """
    thumbnails: list[Thumbnail] = []
    outside = values = 0
    shown: list[int] = []
    channels = 3
    indices = _spread(images.labels, len(images), count, classes)
    fit = None if preprocess is None else partial(preprocess.fit, framing=images.manifest.framing)
    for batch in images.batches(16, indices, transform=fit):
        labels = [-1] * len(batch.images) if batch.labels is None else batch.labels.tolist()
        for image, label in zip(batch.images, labels, strict=True):
            pixels = _in_pixel_space(image)
            outside += int(((pixels < 0) | (pixels > 1)).sum())
            values += pixels.numel()
            channels = len(pixels)
            thumbnails.append(_thumbnail(pixels, _caption(label, class_names)))
            if label >= 0 and label not in shown:
                shown.append(label)
    if not thumbnails:
        raise DataError(f"none of {len(indices)} images could be read")
    return Sheet(tuple(thumbnails), len(images), outside / values, tuple(shown), _channels(channels))


def thumbnail_of(image: Tensor, caption: str) -> Thumbnail:
    """Return the thumbnail of an image `[C, H, W]`, uint8 or floats in pixel space; what leaves 0..1 is cut off."""
    return _thumbnail(_in_pixel_space(image), caption)


def _in_pixel_space(image: Tensor) -> Tensor:
    return image.float() / 255 if image.dtype == torch.uint8 else image.float()


def _spread(labels: Tensor | None, total: int, count: int, classes: Sequence[int]) -> list[int]:
    """Indices of `count` images: classes take turns, ordered by class at the end; evenly spaced without labels."""
    if labels is None:
        return [index * total // min(count, total) for index in range(min(count, total))]
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(index)
    wanted = [label for label in classes if label in members]
    picked = _in_turns([members[label] for label in wanted], count)
    others = [members[label] for label in sorted(members) if label not in wanted]
    picked += _in_turns(others, count - len(picked))
    return sorted(picked, key=lambda index: (int(labels[index]), index))


def _in_turns(groups: list[list[int]], count: int) -> list[int]:
    """The first of each group, then the second, until there are `count`; of too many groups evenly spaced ones."""
    if len(groups) > count:
        groups = [groups[index * len(groups) // count] for index in range(count)]
    picked: list[int] = []
    for depth in range(max((len(group) for group in groups), default=0)):
        picked.extend(group[depth] for group in groups if depth < len(group))
        if len(picked) >= count:
            break
    return picked[:count]


def _channels(count: int) -> str:
    if count in (1, 3):
        return ""
    colours = "the first three as colours, then each further one" if count > 3 else "each"
    return f"{count} channels: {colours} in grey"


def _thumbnail(pixels: Tensor, caption: str) -> Thumbnail:
    panels = [channel[None].expand(3, -1, -1) for channel in (pixels[3:] if len(pixels) >= 3 else pixels)]
    if len(pixels) >= 3:
        panels.insert(0, pixels[:3])
    # beside each other, about as high as wide
    across = math.ceil(math.sqrt(len(panels)))
    panels += [torch.ones_like(panels[0])] * (-len(panels) % across)
    rows = [torch.cat(panels[start : start + across], 2) for start in range(0, len(panels), across)]
    whole = torch.cat(rows, 1)
    data = (whole.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(data.numpy())
    small = max(picture.size) <= _LOSSLESS_SIDE
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
        picture.save(buffer, format="JPEG", quality=85, optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/{'png' if small else 'jpeg'};base64,{encoded}", caption, small)


def _caption(label: int, class_names: Sequence[str]) -> str:
    if label < 0:
        return ""
    return class_names[label].split(",")[0] if label < len(class_names) else f"class {label}"
