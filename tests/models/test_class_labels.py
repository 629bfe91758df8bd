"""Folders named as classes get the network's labels."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from synthquant.core.progress import Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import import_images, open_images
from synthquant.models import class_labels
from synthquant.models.class_labels import Classes, in_classes_of
from synthquant.models.zoo import CIFAR10_CLASSES

CIFAR = Classes("resnet", CIFAR10_CLASSES, 10)
TWO_CRANES = Classes("net", ("tench, Tinca tinca", "crane", "crane", "African hunting dog, hyena dog"), 4)


class Heard(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")

    def say(self, text: str) -> None:
        self.lines.append(text)


def folders(root: Path, *names: str) -> ImageSet:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 3)).save(root / name / "a.png")
    return open_images(root)


def labels(images: ImageSet) -> list[int]:
    assert images.labels is not None
    return images.labels.tolist()


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (("truck", "cat"), CIFAR, [3, 9]),
        (("Truck", "CAT"), CIFAR, [3, 9]),
        (("Tinca_tinca", "african hunting-dog"), TWO_CRANES, [0, 3]),
        (("tench, Tinca tinca",), TWO_CRANES, [0]),
        (("n02099601", "n01443537"), Classes("net", None, 1000), [1, 207]),
    ],
)
def test_a_subset_of_the_classes_by_name(
    tmp_path: Path, names: tuple[str, ...], classes: Classes, expected: list[int]
) -> None:
    heard = Heard()
    images = in_classes_of(folders(tmp_path, *names), classes, "photos", heard)
    assert sorted(labels(images)) == expected
    assert len(heard.lines) == 1 and heard.lines[0].startswith("photos: labels by the names of the folders (")
    # What is derived and saved has the network's labels, and is not translated again.
    assert sorted(labels(images.subset(range(len(images))))) == expected
    saved = images.save(tmp_path / "out" / "set")
    assert labels(in_classes_of(saved, classes, "set", heard)) == labels(images)
    assert images.fingerprint != open_images(tmp_path).fingerprint


def test_names_stay_with_an_imported_set(tmp_path: Path) -> None:
    folders(tmp_path / "photos", "truck", "cat")
    saved = import_images(tmp_path / "photos", tmp_path / "set", Heard())
    assert labels(saved) == [0, 1] and saved.manifest.class_names == ("cat", "truck")
    assert labels(in_classes_of(saved, CIFAR, "set", None)) == [3, 9]


def test_all_classes_in_order_need_no_word(tmp_path: Path) -> None:
    heard = Heard()
    images = in_classes_of(folders(tmp_path, *CIFAR10_CLASSES), CIFAR, "photos", heard)
    assert labels(images) == list(range(10)) and heard.lines == []


def test_numbers_are_class_numbers(tmp_path: Path) -> None:
    heard = Heard()
    images = in_classes_of(folders(tmp_path, "7", "2"), CIFAR, "photos", heard)
    assert labels(images) == [2, 7] and heard.lines == []


@pytest.mark.parametrize(
    ("names", "classes", "doubt"),
    [
        (
            ("cat", "truk"),
            CIFAR,
            "labels are the positions of the 2 sorted folder names, which may be wrong: 'truk' is no name of one class"
            " of resnet; did you mean 'truck'? name the folders as its classes, or by their numbers",
        ),
        (
            ("a", "b", "c", "d"),
            Classes("net", ("w", "x", "y", "z"), 4),
            "labels are the positions of the 4 sorted folder names, which may be wrong: 'a', 'b', 'c', ... are no names"
            " of one class of net; name the folders as its classes, or by their numbers",
        ),
        (
            ("Cat", "cat"),
            CIFAR,
            "labels are the positions of the 2 sorted folder names, which may be wrong: two of them name one class of"
            " resnet",
        ),
        (
            ("crane", "tench"),
            TWO_CRANES,
            "labels are the positions of the 2 sorted folder names, which may be wrong: 'crane' is no name of one class"
            " of net; name the folders as its classes, or by their numbers",
        ),
        (
            ("a", "b"),
            Classes("net", None, 3),
            "labels are the positions of the 2 sorted folder names, which may be wrong: net has 3 classes and does not"
            " say their names; name the folders by the numbers of its classes",
        ),
        (("a", "b"), Classes("net", None, 2), None),
    ],
)
def test_positions_are_said_where_they_may_be_wrong(
    tmp_path: Path, names: tuple[str, ...], classes: Classes, doubt: str | None
) -> None:
    heard = Heard()
    images = in_classes_of(folders(tmp_path, *names), classes, "photos", heard)
    assert labels(images) == list(range(len(names)))
    assert heard.lines == ([] if doubt is None else [f"warning: photos: {doubt}"])


def test_identifiers_of_all_of_imagenet_need_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[str, ...]:
        raise AssertionError("not needed")

    monkeypatch.setattr(class_labels, "imagenet_synsets", missing)
    names = [f"n{number:08d}" for number in range(1000)]
    assert list(class_labels.match_classes(names, None, 1000).values()) == list(range(1000))
