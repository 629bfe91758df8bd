"""Folders as they are found on people's disks."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

from synthquant.core.errors import DataError
from synthquant.core.progress import Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.quality import say_what_was_read
from synthquant.data.sources import import_images, open_images


class Heard(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def say(self, text: str) -> None:
        self.said.append(text)


def photo(path: Path | bytes, shade: int = 9) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        Image.new("RGB", (4, 3), (shade, shade, shade)).save(file, "PNG")


def read(images: ImageSet) -> int:
    return sum(len(batch.images) for batch in images.batches(8))


def reasons(images: ImageSet) -> dict[str, str]:
    return {entry.name: entry.reason for entry in images.set_aside}


@pytest.mark.parametrize("classes", [True, False], ids=["class-folders", "flat"])
def test_what_is_no_file_is_set_aside_and_nothing_waits(tmp_path: Path, classes: bool) -> None:
    inner = tmp_path / "cat" if classes else tmp_path
    photo(inner / "good.png")
    os.mkfifo(inner / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(inner / "socket.png"))
    (inner / "zero.png").symlink_to("/dev/zero")
    (inner / "gone.png").symlink_to(tmp_path / "nothing")
    (inner / "self.png").symlink_to(inner / "self.png")
    (inner / "twice.png").symlink_to(inner / "good.png")
    (inner / "empty.png").touch()
    (inner / "cut.png").write_bytes((inner / "good.png").read_bytes()[:50])
    images = open_images(tmp_path)
    assert read(images) == 1
    start = "cat/" if classes else ""
    found = reasons(images)
    assert found.pop(f"{start}cut.png").startswith("damaged or truncated")
    assert found == {
        f"{start}pipe.png": "a pipe, not a file",
        f"{start}socket.png": "a socket, not a file",
        f"{start}zero.png": "a device, not a file",
        f"{start}gone.png": "a link to nothing",
        f"{start}self.png": "a link that leads back to itself",
        f"{start}twice.png": f"the same file as {start}good.png",
        f"{start}empty.png": "empty: no bytes",
    }


def test_links_to_folders_do_not_multiply_images(tmp_path: Path) -> None:
    photo(tmp_path / "data/cat/a.png")
    photo(tmp_path / "data/dog/b.png")
    photo(tmp_path / "elsewhere/c.png")
    (tmp_path / "data/cat/again").symlink_to(tmp_path / "data/cat")
    (tmp_path / "data/cat/root").symlink_to(tmp_path / "data")
    (tmp_path / "data/dog/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/dog/more2").symlink_to(tmp_path / "elsewhere")
    images = open_images(tmp_path / "data")
    assert read(images) == len(images) == 3
    assert reasons(images) == {
        name: "a link to a folder that is read already" for name in ("cat/again", "cat/root", "dog/more2")
    }


def test_one_file_may_stand_in_two_classes(tmp_path: Path) -> None:
    photo(tmp_path / "cat/a.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog/a.png").symlink_to(tmp_path / "cat/a.png")
    assert open_images(tmp_path).labels is not None and len(open_images(tmp_path)) == 2


def test_names_that_are_no_text(tmp_path: Path) -> None:
    photo(os.fsencode(tmp_path) + b"/a\xff/b\xfe.png", 5)
    photo(tmp_path / "b/esc\x1b[31m\n.png", 6)
    (tmp_path / "b/note\x1b.txt").touch()
    images = open_images(tmp_path)
    assert images.manifest.class_names == (r"a\xff", "b")
    assert [int(image[0, 0, 0]) for batch in images.batches(1) for image in batch.images] == [5, 6]
    saved = import_images(tmp_path, tmp_path / "out" / "set", Heard())
    assert saved.manifest.set_aside[0].name == r"b/note\x1b.txt"
    assert len(images.fingerprint) == 64


def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "cat/a.png")
    photo(tmp_path / "cat/secret/b.png")
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if "secret" in str(folder):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    images = open_images(tmp_path)
    assert reasons(images) == {"cat/secret": "cannot be read: Permission denied"}
    with pytest.raises(DataError, match=r"^cannot read .*secret: Permission denied$"):
        open_images(tmp_path / "cat/secret")


@pytest.mark.parametrize("splits", [("train", "val"), ("test",), ("Train", "other", "validation")])
def test_the_root_of_a_data_set_is_refused_with_the_advice(tmp_path: Path, splits: tuple[str, ...]) -> None:
    for split in splits:
        photo(tmp_path / split / "cat/a.png")
    named = [split for split in splits if split != "other"]
    advice = " or ".join(str(tmp_path / name) for name in named)
    with pytest.raises(DataError) as caught:
        open_images(tmp_path)
    expected = f"{tmp_path} holds the splits of a data set ({', '.join(named)}), not classes; name {advice}"
    assert str(caught.value) == expected
    assert len(open_images(tmp_path / named[0])) == 1


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    photo(tmp_path / "train/a.png")
    photo(tmp_path / "bus/a.png")
    assert open_images(tmp_path).manifest.class_names == ("bus", "train")


def test_sources_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("link").symlink_to("nothing")
    for source, reason in (
        ("pipe", "pipe is a pipe, not a file or folder of images"),
        ("/dev/zero", "/dev/zero is a device, not a file or folder of images"),
        ("link", "link is a link to nothing"),
    ):
        with pytest.raises(DataError) as caught:
            open_images(source)
        assert str(caught.value) == reason
    for source in ("n" * 300, "a\0b"):
        with pytest.raises(DataError, match=r"^no images at "):
            open_images("./" + source)


def test_what_was_left_out_and_changed_is_said_once(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").touch()
    Image.new("RGBA", (4, 3)).save(tmp_path / "c.png")
    images, heard = open_images(tmp_path), Heard()
    assert read(images) == 2
    found = say_what_was_read(images, heard, "photos")
    assert say_what_was_read(images, heard, "photos") == found
    assert heard.warnings == [
        "2 images set aside, for example notes.txt: not an image by its name (in photos)",
    ]
    assert heard.said == ["1 image read with a change: transparency dropped, for example c.png (in photos)"]
    assert found == {
        "set_aside_count": 2,
        "set_aside": [
            {"name": "notes.txt", "reason": "not an image by its name"},
            {"name": "b.png", "reason": "not an image in a known format, or cut short"},
        ],
        "changed": {"transparency dropped": 1},
    }


def test_the_limit_on_pixels_reaches_every_image(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "big.png")
    images = open_images(tmp_path, max_pixels=100)
    assert read(images.subset([0, 1])) == read(images.detached([0, 1])) == read(images) == 1
    assert reasons(images) == {"big.png": "too large: 40x30, the limit is 0.0001 million pixels"}
    saved = import_images(tmp_path, tmp_path / "set", Heard(), max_pixels=100)
    assert len(saved) == 1
    with pytest.raises(DataError, match=r"image 1 \(big\.png\): too large"):
        images[1]
    assert torch.equal(saved[0].image, images[0].image)
