"""A folder of images, flat or with one folder for each class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from synthquant.core.errors import DataError
from synthquant.data.folders import Found, files_below, files_in, folders_in, printable
from synthquant.data.manifest import Manifest, SetAside
from synthquant.data.rows import FileRows

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm")
)
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
