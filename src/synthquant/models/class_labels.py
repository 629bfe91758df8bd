"""Which class of a network each label of a data set means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from synthquant.core.errors import MissingExtraError, did_you_mean
from synthquant.core.progress import Progress
from synthquant.data.image_set import ImageSet
from synthquant.models.float_model import FloatModel
from synthquant.models.imagenet import imagenet_synsets

_SYNSET = re.compile(r"n\d{8}")
_SHOWN = 3


@dataclass(frozen=True)
class Classes:
    """What is known of a network's classes."""

    network: str
    """How to speak of the network."""
    names: Sequence[str] | None
    """What it calls its classes, in the order of the labels; a name may be several, separated by ", "."""
    count: int | None
    """How many there are."""


def classes_of(model: FloatModel) -> Classes:
    """Return what is known of a network's classes."""
    return Classes(model.name, model.class_names, model.num_classes)


def in_classes_of(images: ImageSet, classes: Classes, source: str, progress: Progress | None) -> ImageSet:
    """Return a set whose labels are the numbers of the network's classes.

    Labels that are the positions of named folders are translated if each name is that of exactly one class: as the
    network writes it, without regard to case, spaces, hyphens and underscores, as one of several names of a class, or
    as ImageNet's WordNet identifier. Otherwise they stay positions, which is said. Other labels are class numbers
    already.

    Args:
        images: any set.
        classes: those of the network.
        source: where the images come from.
        progress: takes the warning; none: nothing is said.
    """
    folders = images.manifest.class_names
    if folders is None:
        return images
    found = match_classes(folders, classes.names, classes.count)
    if len(folders) == len(found) == len(set(found.values())):
        numbers = [found[name] for name in folders]
        if progress is not None and numbers != list(range(classes.count or len(folders))):
            listed = ", ".join(f"{name} is {number}" for name, number in list(found.items())[:_SHOWN])
            progress.say(f"{source}: labels by the names of the folders ({listed}{', ...' * (len(found) > _SHOWN)})")
        return images.with_class_numbers(numbers)
    if progress is not None and (warning := _doubt(folders, found, classes)):
        progress.warn(f"{source}: {warning}")
    return images


def match_classes(folders: Sequence[str], names: Sequence[str] | None, count: int | None) -> dict[str, int]:
    """Return the class number of each folder whose name is that of exactly one class."""
    exact = _of_one_class([(name, number) for number, name in enumerate(names or ())])
    loose = _of_one_class(
        [(_plain(text), number) for number, name in enumerate(names or ()) for text in (name, *name.split(", "))]
    )
    if count == 1000 and all(_SYNSET.fullmatch(folder) for folder in folders):
        exact |= _synset_numbers(folders)
    found = {folder: exact.get(folder, loose.get(_plain(folder))) for folder in folders}
    return {folder: number for folder, number in found.items() if number is not None}


def _of_one_class(pairs: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Numbers by name, without the names that several classes have."""
    numbers: dict[str, set[int]] = {}
    for name, number in pairs:
        numbers.setdefault(name, set()).add(number)
    return {name: next(iter(found)) for name, found in numbers.items() if len(found) == 1}


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _synset_numbers(folders: Sequence[str]) -> dict[str, int]:
    if len(folders) == 1000:  # ImageNet's labels are the positions of its sorted identifiers
        return {name: number for number, name in enumerate(sorted(folders))}
    try:
        return {name: number for number, name in enumerate(imagenet_synsets())}
    except MissingExtraError:  # then they are positions, and that is said
        return {}


def _doubt(folders: Sequence[str], found: Mapping[str, int], classes: Classes) -> str | None:
    """Return why labels that are the positions of folders may not be the network's; none if there is no reason."""
    positions = f"labels are the positions of the {len(folders)} sorted folder names"
    unknown = [name for name in folders if name not in found]
    if classes.names and unknown:
        listed = ", ".join(map(repr, unknown[:_SHOWN])) + (", ..." if len(unknown) > _SHOWN else "")
        others = [name for name in classes.names if name != unknown[0]]
        nearest = did_you_mean(unknown[0], others) if found else ""
        return (
            f"{positions}, which may be wrong: {listed} {'are no names' if len(unknown) > 1 else 'is no name'} of"
            f" one class of {classes.network};{nearest} name the folders as its classes, or by their numbers"
        )
    if classes.names:
        return f"{positions}, which may be wrong: two of them name one class of {classes.network}"
    if classes.count is not None and len(folders) != classes.count:
        return (
            f"{positions}, which may be wrong: {classes.network} has {classes.count} classes and does not say their"
            " names; name the folders by the numbers of its classes"
        )
    return None
