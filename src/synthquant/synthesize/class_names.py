"""What the classes of a classifier are called: built in, from a file, or as the network says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from synthquant.core.errors import DataError, InputError, did_you_mean
from synthquant.core.files import read_json
from synthquant.core.settings import Settings, parse_settings
from synthquant.models.imagenet import imagenet_names
from synthquant.models.zoo import CIFAR10_CLASSES

if TYPE_CHECKING:
    from synthquant.models.float_model import FloatModel

BUILT_IN = ("cifar10", "imagenet-1k")
GLOSS_WORDS = 12
"""Words of a gloss that go into a prompt: more would fill the text encoder's tokens with it."""


class ClassName(Settings):
    """What one class is called."""

    names: tuple[str, ...]
    """Names that mean the same, the usual one first."""
    gloss: str = ""
    """What the name means, in a few words; empty: not known."""

    @property
    def explained(self) -> str:
        """The first name with the beginning of its gloss, for example "crane, large long-necked wading bird".

        The name alone if there is no gloss.
        """
        words = self.gloss.partition(";")[0].split()[:GLOSS_WORDS]
        return f"{self.names[0]}, {' '.join(words)}" if words else self.names[0]


def class_names(source: str | Sequence[str], model: FloatModel | None = None) -> tuple[ClassName, ...]:
    """Return the classes in the order of the labels.

    Args:
        source: names themselves; "cifar10" or "imagenet-1k"; "model" for what the network brings; or a file. A text
            file has one class a line: names separated by commas and, after a colon, a gloss. A JSON file is a list of
            names or of objects with `names` and `gloss`.
        model: the network that the names are for.

    Raises `InputError` if there are no such names, none at all, one twice, or another number than the network has
    classes; `DataError` if the file cannot be used; `MissingExtraError` if they come from timm and it is not installed.
    """
    classes, where = _read(source, model)
    if not classes:
        raise InputError(f"{where} names no class; give at least one")
    if any(not entry.names or not all(name.strip() for name in entry.names) for entry in classes):
        raise InputError(f"{where} has a class without a name")
    if model is not None and model.num_classes is not None and len(classes) != model.num_classes:
        raise InputError(
            f"{where} names {len(classes)} classes but {model.name} has {model.num_classes}; set classes to the"
            " network's own, as a list or a file"
        )
    same = [entry.explained for entry, count in Counter(classes).items() if count > 1]
    if same:
        raise InputError(f"{where} names the class {same[0]!r} twice")
    return classes


def prompt_names(classes: Sequence[ClassName]) -> tuple[tuple[str, ...], ...]:
    """Names of each class that mean no other class, the one to use first; no two classes share one.

    These are its first name unless another class begins with it too, and further names that no other class has. Where
    nothing is left, it is the first name with its gloss: ImageNet has two cranes, the bird and the machine.
    """
    firsts = Counter(entry.names[0] for entry in classes)
    everywhere = Counter(name for entry in classes for name in dict.fromkeys(entry.names))
    chosen = []
    for entry in classes:
        own = [entry.names[0]] if firsts[entry.names[0]] == 1 else []
        own += [name for name in dict.fromkeys(entry.names[1:]) if everywhere[name] == 1]
        chosen.append(tuple(own) or (entry.explained,))
    return tuple(chosen)


def class_positions(wanted: Sequence[str], classes: Sequence[ClassName], where: str) -> tuple[int, ...]:
    """Labels of the classes of these names; raises `InputError` for a name that no class has, or two have."""
    by_name: dict[str, list[int]] = {}
    for label, entry in enumerate(classes):
        for name in dict.fromkeys((*entry.names, entry.explained)):
            by_name.setdefault(name, []).append(label)
    found = []
    for name in wanted:
        labels = by_name.get(name, [])
        if not labels:
            raise InputError(
                f"{where}: unknown class {name!r};{did_you_mean(name, by_name)} there are {len(classes)},"
                f" for example {', '.join(entry.names[0] for entry in classes[:3])}"
            )
        if len(labels) > 1:
            texts = " or ".join(repr(classes[label].explained) for label in labels)
            raise InputError(f"{where}: {len(labels)} classes are called {name!r}; write {texts}")
        found.append(labels[0])
    return tuple(found)


def _read(source: str | Sequence[str], model: FloatModel | None) -> tuple[tuple[ClassName, ...], str]:
    """Return the classes and how to speak of where they come from."""
    if not isinstance(source, str):
        return tuple(ClassName(names=(name,)) for name in source), "classes"
    if source == "cifar10":
        return tuple(ClassName(names=(name,)) for name in CIFAR10_CLASSES), "classes=cifar10"
    if source == "imagenet-1k":
        found = imagenet_names()
        return tuple(ClassName(names=names, gloss=gloss) for names, gloss in found), "classes=imagenet-1k"
    if source == "model":
        if model is None or model.class_names is None:
            name = "there is no network that" if model is None else f"{model.name} does not say what its classes are"
            missing = name if model is not None else f"{name} names classes"
            raise InputError(f"{missing}; set classes to {', '.join(BUILT_IN)}, a list of names or a file")
        return tuple(ClassName(names=tuple(text.split(", "))) for text in model.class_names), model.name
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(
            f"classes={source} is no file and not built in;{did_you_mean(source, (*BUILT_IN, 'model'))} give"
            f" {', '.join(BUILT_IN)}, model, a list of names or a file"
        )
    return (_from_json(path) if path.suffix == ".json" else _from_text(path)), str(path)


def _from_text(path: Path) -> tuple[ClassName, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read class names from {path}: {getattr(error, 'strerror', None) or error}") from error
    classes = []
    for line in lines:
        names, _, gloss = line.partition(":")
        if line.strip():
            classes.append(ClassName(names=tuple(name.strip() for name in names.split(",")), gloss=gloss.strip()))
    return tuple(classes)


def _from_json(path: Path) -> tuple[ClassName, ...]:
    try:
        values = read_json(path)
    except InputError as error:
        raise DataError(str(error)) from error
    if not isinstance(values, list) or not all(isinstance(value, str | dict) for value in values):
        raise DataError(f"{path} must hold a list of names or of objects with names and gloss, see {_EXAMPLE}")
    return tuple(
        ClassName(names=(value,)) if isinstance(value, str) else parse_settings(ClassName, value, f"{path}[{place}]")
        for place, value in enumerate(values)
    )


_EXAMPLE = json.dumps([{"names": ["crane"], "gloss": "a wading bird"}])
