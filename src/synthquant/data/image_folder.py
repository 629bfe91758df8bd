"""A folder of images, flat or with one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.files import atomic_folder
from synthquant.core.progress import QUIET, Progress
from synthquant.data.folders import Found, files_below, files_in, folders_in, printable
from synthquant.data.image_set import ImageSet
from synthquant.data.manifest import Manifest, SetAside
from synthquant.data.rows import FileRows

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm")
)
_WRITTEN_TOGETHER = 256
_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}


def open_image_folder(root: Path) -> tuple[FileRows, Manifest]:
    """Return the images below `root` and what is known of them.

    With class folders the labels are their numbers, if all have whole numbers as names, or else the positions of the
    sorted names, which are the manifest's `class_names`. Files that are no images are set aside.

    Raises `DataError` if `root` cannot be read or holds the splits of a data set.
    """
    inside = {name: files_below(root, name) for name in folders_in(root)}
    classes = [name for name, found in inside.items() if any(_fault(one) is None for one in found)]
    require_one_split(root, classes)
    top = files_in(root)
    images = [one.name for one in top if _fault(one) is None]
    labels = class_names = None
    left_out = [*top, *(one for found in inside.values() for one in found)]
    set_aside = [SetAside(name=printable(one.name), reason=fault) for one in left_out if (fault := _fault(one))]
    if classes:
        set_aside += [SetAside(name=printable(name), reason="outside the class folders") for name in images]
        numbers, class_names = _class_numbers(classes)
        labelled = [(one.name, numbers[name]) for name in classes for one in inside[name] if _fault(one) is None]
        images, labels = [name for name, _ in labelled], [label for _, label in labelled]
    manifest = Manifest(count=len(images), framing="raw", class_names=class_names, set_aside=tuple(set_aside))
    return FileRows(root, images, labels), manifest


def write_image_folder(images: ImageSet, folder: Path | str, progress: Progress = QUIET) -> int:
    """Write the images as PNG files `NUMBER.png` below a new folder, in one folder for each class, and return how many.

    Without labels all lie in `folder` itself. Class folders are called by the class names of the set, or else by the
    numbers. Values beyond black and white are cut off.

    Raises:
        DataError: images have neither 1 nor 3 channels, or none can be read.
        OutputError: `folder` exists and is not empty, or cannot be written.
    """
    written = 0
    with (
        atomic_folder(Path(folder)) as temporary,
        progress.bar(f"write {Path(folder).name}", len(images)) as bar,
    ):
        for batch in images.batches(_WRITTEN_TOGETHER):
            labels = [-1] * len(batch.images) if batch.labels is None else batch.labels.tolist()
            for image, label, number in zip(batch.images, labels, batch.indices, strict=True):
                place = temporary / _class_folder(label, images.manifest.class_names)
                place.mkdir(exist_ok=True)
                _picture(image).save(place / f"{int(number):08d}.png")
                written += 1
            bar.advance(len(batch.images))
        if not written:
            raise DataError(f"none of {len(images)} images is usable{images.example_set_aside}")
    return written


def _class_folder(label: int, names: Sequence[str] | None) -> str:
    """The folder of a class: none of the class names, which may be anything, leads out of it."""
    if label < 0:
        return "."
    name = str(label) if names is None or label >= len(names) else names[label]
    return name.replace("/", "_").replace("\\", "_").lstrip(".") or str(label)


def _picture(image: Tensor) -> Image.Image:
    if len(image) not in (1, 3):
        raise DataError(f"a PNG has 1 or 3 channels, these images have {len(image)}; read them with ImageSet.open")
    if image.dtype != torch.uint8:
        image = image.float().nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if len(image) == 1 else pixels))


def require_one_split(root: Path, names: Sequence[str]) -> None:
    """Raise `DataError` if these names of folders in `root` are those of splits, such as `train` and `val`."""
    splits = [name for name in names if name.lower() in _SPLIT_OF]
    if splits and (len(splits) == len(names) or len({_SPLIT_OF[name.lower()] for name in splits}) > 1):
        advice = " or ".join(str(root / name) for name in splits)
        raise DataError(f"{root} holds the splits of a data set ({', '.join(splits)}), not classes; name {advice}")


def _fault(found: Found) -> str | None:
    """Why an entry gives no image, as far as can be said without opening it."""
    if found.reason is None and os.path.splitext(found.name)[1].lower() not in SUFFIXES:
        return "not an image by its name"
    return found.reason


def _class_numbers(classes: Sequence[str]) -> tuple[dict[str, int], tuple[str, ...] | None]:
    # Sorted as text, "10" comes before "2": folders that are numbered mean their numbers.
    if all(name.isdecimal() for name in classes):
        return {name: int(name) for name in classes}, None
    return {name: number for number, name in enumerate(classes)}, tuple(printable(name) for name in classes)
