from __future__ import annotations

import io
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from synthquant.core.errors import DataError, MissingExtraError, UnknownNameError
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess
from synthquant.data.sources import import_images, open_images
from synthquant.data.store import ImageSetWriter


def _png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, shade, 255 - shade)).save(stream, "PNG")
    return stream.getvalue()


def _parquet(path: Path, count: int, image: str = "image", label: str = "label", start: int = 0) -> Path:
    rows = [{"bytes": _png(start + index), "path": f"{start + index}.png"} for index in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({image: rows, label: list(range(start, start + count))}), path, row_group_size=2)
    return path


def _shades(image_set: ImageSet) -> list[int]:
    return [int(image[0, 0, 0]) for batch in image_set.batches(3) for image in batch.images]


def _labels(image_set: ImageSet) -> list[int]:
    assert image_set.labels is not None
    return image_set.labels.tolist()


def test_class_folders(tmp_path: Path) -> None:
    for name, shade in (("dog/b.png", 1), ("dog/a.JPG", 2), ("cat/deep/x.png", 3), ("emu/.hidden.png", 4)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(_png(shade))
    (tmp_path / "dog/notes.txt").write_text("")
    (tmp_path / "top.png").write_bytes(_png(9))
    (tmp_path / ".cache").mkdir()
    image_set = open_images(tmp_path)
    # "emu" has no image of its own and so is no class.
    assert _labels(image_set) == [0, 1, 1]
    assert _shades(image_set) == [3, 2, 1]
    assert image_set.manifest.framing == "raw"
    assert {entry.name: entry.reason for entry in image_set.set_aside} == {
        "dog/notes.txt": "not an image by its name",
        "top.png": "outside the class folders",
    }


def test_numbered_class_folders_mean_their_numbers(tmp_path: Path) -> None:
    for name in ("0", "2", "10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(_png(int(name)))
    image_set = open_images(tmp_path)
    assert _labels(image_set) == _shades(image_set) == [0, 10, 2]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for shade in range(3):
        (tmp_path / f"{shade}.png").write_bytes(_png(shade))
    image_set = open_images(str(tmp_path))
    assert image_set.labels is None
    assert _shades(image_set) == [0, 1, 2]
    before = image_set.fingerprint
    assert open_images(tmp_path).fingerprint == before
    (tmp_path / "1.png").write_bytes(_png(1) + b"longer")
    assert open_images(tmp_path).fingerprint != before
    with pytest.raises(DataError, match="no column 'score'"):
        image_set.column("score")


def test_parquet_file(tmp_path: Path) -> None:
    image_set = open_images(_parquet(tmp_path / "a.parquet", 5))
    assert _labels(image_set) == _shades(image_set) == [0, 1, 2, 3, 4]
    assert image_set[4].image.shape == (3, 3, 4)
    assert len(image_set.fingerprint) == 64


def test_parquet_folder_in_the_order_of_its_names(tmp_path: Path) -> None:
    _parquet(tmp_path / "data/b.parquet", 3, start=4)
    _parquet(tmp_path / "data/a.parquet", 4)
    (tmp_path / "README.md").write_text("")
    assert _labels(open_images(tmp_path)) == _shades(open_images(tmp_path)) == list(range(7))


def test_columns_by_other_names(tmp_path: Path) -> None:
    assert _labels(open_images(_parquet(tmp_path / "img.parquet", 2, image="img"))) == [0, 1]
    path = _parquet(tmp_path / "own.parquet", 3, image="photo", label="kind")
    image_set = open_images(path, columns=("photo", "kind"))
    assert _labels(image_set) == _shades(image_set) == [0, 1, 2]
    with pytest.raises(DataError, match=r"own\.parquet has no image column image or img; columns: photo, kind"):
        open_images(path)
    with pytest.raises(DataError, match=r"own\.parquet has no column 'sort'; columns: photo, kind"):
        open_images(path, columns=("photo", "sort"))


def test_image_set_folder(tmp_path: Path) -> None:
    ImageSet.from_tensors(torch.rand(3, 3, 4, 4)).save(tmp_path / "set")
    assert open_images(tmp_path / "set").manifest.framing == "cropped"
    ImageSetWriter(
        tmp_path / "half", method="m", settings={}, seed=0, model_fingerprint=None, image_size=(4, 4), target_count=3
    )
    with pytest.raises(DataError, match="half is an unfinished image set; run the command that makes it again"):
        open_images(tmp_path / "half")


def test_bundled_test_images() -> None:
    image_set = open_images("bundled/cifar10-test")
    assert len(image_set) == 5000
    assert image_set.labels is not None
    assert image_set.labels.bincount().tolist() == [500] * 10
    assert image_set[4999].image.shape == (3, 32, 32)
    with pytest.raises(UnknownNameError, match="unknown bundled image set 'cifar10-tets'; did you mean 'cifar10-test'"):
        open_images("bundled/cifar10-tets")


@pytest.mark.parametrize("source", ["no/such/folder", "/none", "./none", "none.parquet", "a b", ""])
def test_nothing_there(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^no images .*; accepted: an image set folder, .*, or bundled/NAME$"):
        open_images(source)


def test_files_and_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some text")
    with pytest.raises(DataError, match=r"notes\.txt is damaged or not a Parquet file: .*; accepted: "):
        open_images(tmp_path / "notes.txt")
    with pytest.raises(
        DataError, match=r"no images in .*, only notes\.txt and the like \(not an image by its name\); accepted: "
    ):
        open_images(tmp_path)
    _parquet(tmp_path / "empty.parquet", 0)
    (tmp_path / "empty.parquet").unlink()
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"no images in .*empty\.parquet"):
        open_images(tmp_path / "empty.parquet")


def test_import_copies_and_sets_aside(tmp_path: Path) -> None:
    good = [{"bytes": _png(index), "path": None} for index in range(3)]
    rows = [good[0], {"bytes": _png(7)[:50], "path": "half.png"}, good[1], {"bytes": None, "path": None}, good[2]]
    pq.write_table(pa.table({"image": rows, "label": [5, 6, 7, 8, 9]}), tmp_path / "a.parquet")
    image_set = import_images(tmp_path / "a.parquet", tmp_path / "set")
    image_set.verify()
    assert _labels(image_set) == [5, 7, 9]
    assert _shades(image_set) == [0, 1, 2]
    assert [(entry.name, entry.reason.split(":")[0]) for entry in image_set.manifest.set_aside] == [
        ("half.png", "damaged or truncated"),
        ("a.parquet row 3", "empty"),
    ]
    assert image_set.manifest.statistics is not None
    assert image_set.manifest.image_size == (3, 4)


def _dataset(count: int = 4) -> Any:
    features = datasets.Features(
        {"img": datasets.Image(), "fine": datasets.ClassLabel(names=["a", "b"]), "caption": datasets.Value("string")}
    )
    pictures = [Image.fromarray(np.full((3, 4, 3), index, np.uint8)) for index in range(count)]
    values = {
        "img": pictures,
        "fine": [index % 2 for index in range(count)],
        "caption": [f"c{i}" for i in range(count)],
    }
    return datasets.Dataset.from_dict(values, features=features)


def test_dataset_saved_to_disk(tmp_path: Path) -> None:
    _dataset().save_to_disk(tmp_path / "saved")
    image_set = open_images(tmp_path / "saved")
    assert _shades(image_set) == [0, 1, 2, 3]
    assert _labels(image_set) == [0, 1, 0, 1]
    assert image_set.column("caption") == ["c0", "c1", "c2", "c3"]
    assert image_set.column_names == ("caption",)
    assert len(image_set.fingerprint) == 64
    saved = import_images(tmp_path / "saved", tmp_path / "set")
    assert saved[3].columns == {"caption": "c3"}


def test_dataset_by_name_and_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return _dataset(5)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(
        datasets,
        "get_dataset_split_names",
        lambda name: {"one": ["train"], "two": ["a", "b"]}.get(name, ["train", "test"]),
    )
    assert len(open_images("org/name:validation[:5]")) == 5
    assert _labels(open_images("one")) == [0, 1, 0, 1, 0]
    open_images("org/three")
    assert asked == [("org/name", "validation[:5]"), ("one", "train"), ("org/three", "test")]
    with pytest.raises(DataError, match="dataset 'two' has several splits, say which: two:a, two:b"):
        open_images("two")
    with pytest.raises(DataError, match="dataset 'one' has no column 'x'; columns: img, fine, caption"):
        open_images("one", columns=("img", "x"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: _dataset(2).remove_columns("img"))
    with pytest.raises(DataError, match="dataset 'one' has no column of images; columns: fine, caption"):
        open_images("one")


def test_dataset_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no images at 'nothere': no such file or folder, and datasets says: "):
        open_images("nothere:test")


def test_without_a_network_the_answer_comes_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(
        DataError, match=r"no images at 'imgaes': no such file or folder, and .* cannot be reached .*; accepted: "
    ):
        open_images("imgaes")


def test_datasets_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"^'cifar10' is no file or folder of images, .*synthquant\[data\]'$"):
        open_images("cifar10:test")


def test_what_a_program_has_in_its_hands() -> None:
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    opened = open_images(pixels)
    assert open_images(opened) is opened and torch.equal(opened[1].image, pixels[1])
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": _png(1), "path": None}, {"bytes": _png(2), "path": None}], "label": [4, 3]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    read = open_images(table)
    assert _shades(read) == [1, 2] and _labels(read) == [4, 3]
    preprocess = Preprocess(input_size=(2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert torch.equal(open_images(preprocess.normalize(pixels / 255), preprocess=preprocess)[1].image, pixels[1])
    for source in (opened, "bundled/cifar10-test"):
        with pytest.raises(DataError, match="preprocess"):
            open_images(source, preprocess=preprocess)
