from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from synthquant.core.errors import DataError
from synthquant.data import part_writer, parts
from synthquant.data.image_set import pixels
from synthquant.data.part_writer import PartsWriter
from synthquant.data.parts import ParquetRows, PartFile, open_parquet


def _images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)).half()


def _rows(folder: Path, counts: tuple[int, ...], images: torch.Tensor) -> ParquetRows:
    writer = PartsWriter(folder)
    for some in images.split(counts):
        writer.write(list(some), None, {})
    return ParquetRows([PartFile(folder / part.name, part.count) for part in writer.parts])


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_writer, "_ROW_GROUP_ROWS", 3)


@pytest.mark.usefixtures("small_groups")
def test_any_image_of_any_part_and_row_group(tmp_path: Path) -> None:
    images = _images(20)
    rows = _rows(tmp_path, (7, 1, 12), images)
    assert open_parquet(tmp_path / "part-00002.parquet").metadata.num_row_groups == 4
    assert len(rows) == 20
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1)).tolist()
    for chosen in (list(range(20)), order, [19], [0, 0, 7, 8], []):
        fetched = [pixels(stored) for stored in rows.fetch(chosen)]
        assert all(torch.equal(image, images[index]) for image, index in zip(fetched, chosen, strict=True))


@pytest.mark.usefixtures("small_groups")
def test_one_image_reads_one_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _rows(tmp_path, (12,), _images(12))
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        assert columns == ["image"]
        read.append(group)
        return original(self, group, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    rows.fetch([4])
    rows.fetch([3, 5])
    assert read == [1]
    rows.fetch([0, 11, 1])
    assert sorted(read) == [0, 1, 3]


@pytest.mark.usefixtures("small_groups")
def test_few_row_groups_and_files_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_CACHE_BYTES", 2000)
    monkeypatch.setattr(parts, "_OPEN_FILES", 2)
    images = _images(24)
    rows = _rows(tmp_path, (6,) * 4, images)
    for index in range(24):
        assert torch.equal(pixels(rows.fetch([index])[0]), images[index])
        assert len(rows._open) <= 2
        assert sum(array.nbytes for array in rows._cache.values()) <= 2000
    assert len(rows._cache) >= 1


def test_large_images_make_small_row_groups() -> None:
    assert part_writer._row_group_rows([b"x" * 2**20] * 10) == 8
    assert part_writer._row_group_rows([b"x"] * 10) == 1000
    assert part_writer._row_group_rows([b"x" * 2**25]) == 1


def test_foreign_files_of_several_kinds(tmp_path: Path) -> None:
    plain = pa.table({"image": pa.array([b"abc", None]), "label": pa.array([1, None], pa.int32())})
    pq.write_table(plain, tmp_path / "a.parquet")
    rows = ParquetRows([PartFile(tmp_path / "a.parquet", 2)])
    assert [(stored.name, stored.content) for stored in rows.fetch([0, 1])] == [
        ("a.parquet row 0", b"abc"),
        ("a.parquet row 1", b""),
    ]
    labels = rows.labels()
    assert labels is not None
    assert labels.tolist() == [1, -1]
    pointing = pa.table({"image": pa.array([{"bytes": None, "path": "b/c.png"}, None])})
    pq.write_table(
        pointing.cast(pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])),
        tmp_path / "p.parquet",
    )
    rows = ParquetRows([PartFile(tmp_path / "p.parquet", 2)], label_column=None)
    first, second = rows.fetch([0, 1])
    assert (first.content, second.content) == (tmp_path / "b/c.png", b"")
    assert rows.labels() is None


def test_labels_must_be_whole_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"a"], "label": ["cat"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'label' in .*a\.parquet holds string; labels are whole numbers"):
        ParquetRows([PartFile(tmp_path / "a.parquet", 1)]).labels()


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"a"], "label": [1], "x": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"a"], "label": [1], "x": ["1"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": [b"a"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="column 'x' has different types"):
        ParquetRows([PartFile(tmp_path / name, 1) for name in ("a.parquet", "b.parquet")]).column("x")
    with pytest.raises(DataError, match=r"c\.parquet has no column 'label', which a\.parquet has"):
        ParquetRows([PartFile(tmp_path / name, 1) for name in ("a.parquet", "c.parquet")]).labels()
