"""Parquet columns of other types than images and labels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from synthquant.core.errors import DataError
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 3), (7, 7, 7)).save(stream, "PNG")
    return stream.getvalue()


def table(folder: Path, image: Any, label: Any = None) -> ImageSet:
    columns = {"image": image} | ({} if label is None else {"label": label})
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return open_images(folder / "a.parquet")


BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        (["a.png"], pa.string()),
        ([1], pa.int64()),
        ([1.5], pa.float32()),
        ([[1, 2]], pa.list_(pa.uint8())),
        ([True], pa.bool_()),
        ([None], pa.null()),
        ([{"data": b"x"}], pa.struct([("data", pa.binary())])),
        ([{"bytes": "text"}], pa.struct([("bytes", pa.string())])),
        ([{"bytes": b"x", "path": 3}], pa.struct([("bytes", pa.binary()), ("path", pa.int32())])),
        ([{"bytes": [1], "path": "a"}], pa.struct([("bytes", pa.list_(pa.uint8())), ("path", pa.string())])),
    ],
)
def test_columns_that_hold_no_images(tmp_path: Path, values: list[Any], type_: pa.DataType) -> None:
    with pytest.raises(DataError) as caught:
        table(tmp_path, pa.array(values, type_))
    known = str(type_).replace("item", "element")  # as Parquet calls it
    assert str(caught.value).startswith(f"column 'image' in {tmp_path / 'a.parquet'} holds {known}; images are bytes")


def test_every_file_of_a_folder_is_checked(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png()]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": ["text"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"column 'image' in .*b\.parquet holds string"):
        open_images(tmp_path)
    pq.write_table(pa.table({"other": [png()]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has no column 'image', which a\.parquet has"):
        open_images(tmp_path)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([png(), None]),
        pa.array([png(), b""], pa.large_binary()),
        pa.array([png(), None]).dictionary_encode(),
        pa.array([{"bytes": png(), "path": None}, None], BYTES_AND_PATH),
        pa.array([{"bytes": png()}, {"bytes": None}], pa.struct([("bytes", pa.binary())])),
        pa.array([{"bytes": None, "path": "a.png"}, {"bytes": None, "path": "/dev/zero"}], BYTES_AND_PATH),
        pa.array([{"path": "a.png"}, {"path": "x" * 5000}], pa.struct([("path", pa.string())])),
        pa.array([{"path": "a.png"}, {"path": "a\0b"}], pa.struct([("path", pa.string())])),
    ],
    ids=str,
)
def test_images_in_any_form_and_cells_without_one(tmp_path: Path, column: pa.Array) -> None:
    (tmp_path / "a.png").write_bytes(png())
    images = table(tmp_path, column)
    assert [int(image[0, 0, 0]) for batch in images.batches(4) for image in batch.images] == [7]
    assert len(images.set_aside) == 1


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    raw = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    cells = pa.StructArray.from_arrays([pa.array([png()]), raw], names=["bytes", "path"])
    images = table(tmp_path, cells)
    assert [len(batch.images) for batch in images.batches(4)] == [1]


@pytest.mark.parametrize(
    ("values", "type_", "reason"),
    [
        ([1.0], pa.float64(), "holds double; labels are whole numbers"),
        (["cat"], pa.string(), "holds string; labels are whole numbers"),
        ([True], pa.bool_(), "holds bool; labels are whole numbers"),
        ([[1]], pa.list_(pa.int64()), "; labels are whole numbers"),
        ([{"a": 1}], pa.struct([("a", pa.int64())]), "; labels are whole numbers"),
        ([2**63], pa.uint64(), "holds numbers beyond 2^63; labels are whole numbers"),
    ],
)
def test_labels_of_another_type(tmp_path: Path, values: list[Any], type_: pa.DataType, reason: str) -> None:
    images = table(tmp_path, pa.array([png()]), pa.array(values, type_))
    with pytest.raises(DataError) as caught:
        _ = images.labels
    assert str(caught.value).startswith(f"column 'label' in {tmp_path / 'a.parquet'} holds ")
    assert reason in str(caught.value)


@pytest.mark.parametrize("names", [("train-00000-of-00001", "test-00000-of-00001"), ("train/0", "val/0")])
def test_tables_of_several_splits_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [png()]}), tmp_path / "data" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"holds the splits of a data set \(\w+, train|\(train, \w+\), not classes"):
        open_images(tmp_path)
