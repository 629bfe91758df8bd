from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tests.damage import same_or_refused

from synthquant.core.errors import DataError, OutputError
from synthquant.core.files import read_json, read_sealed_json, sha256_file, write_json, write_sealed_json
from synthquant.core.progress import ConsoleProgress
from synthquant.data import image_set as module
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images


def _floats(count: int, size: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _class_folder(root: Path, count: int = 6) -> Path:
    for index in range(count):
        folder = root / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5 + index, 4), (10 * index, 0, 0)).save(folder / f"{index}.png")
    return root


def test_in_memory_records() -> None:
    image_set = ImageSet.from_tensors(
        _floats(5), torch.arange(5), columns={"score": torch.arange(5) / 2}, method="noise"
    )
    record = image_set[-1]
    assert torch.equal(record.image, _floats(5)[4].half())
    assert (record.label, record.columns) == (4, {"score": 2.0})
    assert len(image_set) == 5
    assert image_set.manifest.image_size == (6, 6)
    assert (image_set.manifest.dtype, image_set.manifest.framing) == ("float16", "cropped")
    assert image_set.column("score") == [0.0, 0.5, 1.0, 1.5, 2.0]
    with pytest.raises(IndexError, match="image 5 of 5"):
        image_set[5]
    assert len(list(image_set)) == 5


def test_pixel_type_follows_the_range_unless_given() -> None:
    inside = torch.rand(2, 3, 4, 4)
    assert ImageSet.from_tensors(inside).manifest.dtype == "uint8"
    assert torch.equal(ImageSet.from_tensors(inside)[1].image, (inside[1] * 255).round().to(torch.uint8))
    assert ImageSet.from_tensors(inside, dtype="float16").manifest.dtype == "float16"
    assert ImageSet.from_tensors(inside * 1.5).manifest.dtype == "float16"
    assert ImageSet.from_tensors(inside.fill_(float("nan"))).manifest.dtype == "float16"


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_saved_set_opens_equal(tmp_path: Path, dtype: str) -> None:
    images = _floats(23) if dtype == "float16" else torch.randint(0, 256, (23, 3, 6, 6), dtype=torch.uint8)
    labels = torch.arange(23) % 4
    labels[3] = -1
    made = ImageSet.from_tensors(images, labels, columns={"prompt": [f"a {i}" for i in range(23)]}, seed=3, method="m")
    saved = made.save(tmp_path / "set")
    saved.verify()
    assert saved.manifest.dtype == dtype
    assert (saved.manifest.seed, saved.manifest.method, saved.manifest.count) == (3, "m", 23)
    assert all(torch.equal(saved[i].image, made[i].image) for i in range(23))
    assert saved.labels is not None
    assert torch.equal(saved.labels, labels)
    assert saved[3].label is None
    assert saved.column("prompt")[22] == "a 22"
    assert saved.fingerprint == ImageSet.open(tmp_path / "set").fingerprint
    again = made.save(tmp_path / "again")
    assert again.manifest == saved.manifest
    assert (tmp_path / "again/manifest.json").read_bytes() == (tmp_path / "set/manifest.json").read_bytes()


def test_statistics_are_those_of_the_stored_pixels(tmp_path: Path) -> None:
    images = _floats(9)
    found = ImageSet.from_tensors(images).save(tmp_path / "set").manifest.statistics
    stored = images.half().double()
    assert found is not None
    assert torch.allclose(torch.tensor(found.mean).double(), stored.mean((0, 2, 3)), atol=1e-9)
    assert torch.allclose(torch.tensor(found.std).double(), stored.std((0, 2, 3), correction=0), atol=1e-9)
    assert (found.min, found.max) == (stored.min().item(), stored.max().item())


def test_sets_without_labels_or_columns(tmp_path: Path) -> None:
    image_set = ImageSet.from_tensors(_floats(3)).save(tmp_path / "set")
    assert image_set.labels is None
    assert image_set[0].label is None
    assert image_set.column_names == ()
    assert next(iter(image_set.batches(2))).labels is None


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 100])
def test_batches_cover_everything_once(tmp_path: Path, batch_size: int) -> None:
    image_set = ImageSet.from_tensors(_floats(10), torch.arange(10)).save(tmp_path / "set")
    batches = list(image_set.batches(batch_size))
    assert [len(batch.images) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert [index for batch in batches for index in batch.indices] == list(range(10))
    for batch in batches:
        assert batch.labels is not None
        assert batch.labels.tolist() == batch.indices
        assert torch.equal(torch.stack(batch.images), _floats(10).half()[batch.indices])


def test_batches_of_chosen_images_keep_their_order_and_transform(tmp_path: Path) -> None:
    image_set = ImageSet.from_tensors(_floats(10)).save(tmp_path / "set")
    batches = list(image_set.batches(3, [9, 0, 9, 4], transform=lambda image: image * 2))
    assert [batch.indices for batch in batches] == [[9, 0, 9], [4]]
    assert torch.equal(batches[0].images[2], _floats(10)[9].half() * 2)


def test_an_abandoned_iteration_ends_its_threads(tmp_path: Path) -> None:
    import threading

    image_set = ImageSet.from_tensors(_floats(10)).save(tmp_path / "set")
    before = threading.active_count()
    batches = image_set.batches(1)
    next(batches)
    batches.close()  # type: ignore[attr-defined]  # an iterator that is a generator
    assert threading.active_count() == before


def test_batch_size_is_checked() -> None:
    with pytest.raises(DataError, match="batch size must be at least 1, got 0"):
        next(ImageSet.from_tensors(_floats(2)).batches(0))


def test_subset_of_a_subset(tmp_path: Path) -> None:
    image_set = ImageSet.from_tensors(_floats(10), torch.arange(10), columns={"a": list(range(10))}).save(
        tmp_path / "set"
    )
    inner = image_set.with_columns(b=torch.arange(10) * 10).subset([8, 6, 4]).subset(torch.tensor([2, 0]))
    assert inner.labels is not None
    assert inner.labels.tolist() == [4, 8]
    assert (inner.column("a"), inner.column("b")) == ([4, 8], [40, 80])
    assert torch.equal(inner[1].image, _floats(10)[8].half())
    assert inner[0].columns == {"a": 4, "b": 40}
    assert (len(inner), inner.manifest.count) == (2, 2)
    assert torch.equal(next(inner.batches(5)).images[0], _floats(10)[4].half())
    with pytest.raises(DataError, match="subset of 2 images asks for position 2"):
        inner.subset([2])
    with pytest.raises(DataError, match="negative"):
        inner.subset([-1])
    assert len(inner.subset([])) == 0


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    image_set = ImageSet.from_tensors(_floats(4)).save(tmp_path / "set")
    other = ImageSet.from_tensors(_floats(4, seed=1)).save(tmp_path / "other")
    versions = [
        image_set,
        other,
        image_set.subset([0, 1, 2, 3]),
        image_set.subset([1, 0, 2, 3]),
        image_set.with_columns(a=[1, 2, 3, 4]),
        image_set.with_columns(a=[1, 2, 3, 5]),
        ImageSet.from_tensors(_floats(4)),
        ImageSet.from_tensors(_floats(4), torch.arange(4)),
    ]
    assert len({version.fingerprint for version in versions}) == len(versions)


def test_columns_are_checked() -> None:
    image_set = ImageSet.from_tensors(_floats(2), columns={"score": [1, 2]})
    with pytest.raises(DataError, match=r"no column 'scores'; did you mean 'score'\? columns: score"):
        image_set.column("scores")
    with pytest.raises(DataError, match="column 'a' has 3 values for 2 images"):
        image_set.with_columns(a=[1, 2, 3])
    with pytest.raises(DataError, match="column name 'label' is reserved"):
        image_set.with_columns(label=[1, 2])
    assert image_set.with_columns(score=[5, 6]).column("score") == [5, 6]
    assert image_set.column("score") == [1, 2]


def test_images_keep_their_encoding_when_saved(tmp_path: Path) -> None:
    source = _class_folder(tmp_path / "source")
    saved = open_images(source).save(tmp_path / "set")
    files = sorted(source.rglob("*.png"))
    assert [stored.content for stored in saved._fetch(range(6))] == [file.read_bytes() for file in files]
    assert saved.manifest.image_size is None
    assert saved.manifest.framing == "raw"
    assert saved.labels is not None
    assert saved.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_broken_images_are_set_aside_with_a_reason(tmp_path: Path) -> None:
    source = _class_folder(tmp_path / "source")
    good = (source / "cat/0.png").read_bytes()
    (source / "cat/1-half.png").write_bytes(good[: len(good) // 2])
    (source / "dog/0-empty.jpg").write_bytes(b"")
    (source / "dog/9-text.jpg").write_text("not an image")
    image_set = open_images(source)
    assert len(image_set) == 9
    batches = list(image_set.batches(4))
    assert [batch.indices for batch in batches] == [[0, 2, 3], [5, 6, 7]]
    expected = {"cat/1-half.png", "dog/0-empty.jpg", "dog/9-text.jpg"}
    assert {entry.name for entry in image_set.set_aside} == expected
    list(image_set.batches(2))
    assert len(image_set.set_aside) == 3  # a second reading finds the same ones
    with pytest.raises(DataError, match=r"image 1 \(cat/1-half\.png\): "):
        image_set[1]
    saved = image_set.save(tmp_path / "set")
    assert len(saved) == 6
    assert {entry.name for entry in saved.manifest.set_aside} == expected
    assert saved.labels is not None
    assert saved.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_broken_images_of_one_name_are_each_set_aside(tmp_path: Path) -> None:
    rows = [{"bytes": b"x", "path": "0.png"}, {"bytes": b"y", "path": "0.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    image_set = open_images(tmp_path / "a.parquet")
    assert list(image_set.batches(1)) == []
    assert [entry.name for entry in image_set.set_aside] == ["0.png", "0.png"]


def test_a_set_of_broken_images_cannot_be_saved(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.png").write_text("x")
    with pytest.raises(DataError, match=r"none of 1 images is usable \(for example a\.png: not an image"):
        open_images(tmp_path / "source").save(tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_saving_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="already exists and is not empty"):
        ImageSet.from_tensors(_floats(2)).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_saving_splits_into_parts_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SAVED_TOGETHER", 3)
    monkeypatch.setattr(module, "_PART_COUNT", 6)
    images = _floats(16)
    images[5] = 0
    images[9] = images[8]
    stream = io.StringIO()
    saved = ImageSet.from_tensors(images, torch.arange(16)).save(tmp_path / "set", ConsoleProgress(stream))
    assert [part.count for part in saved.manifest.parts] == [6, 6, 4]
    assert torch.equal(torch.stack([saved[i].image for i in range(16)]), images.half())
    assert (saved.manifest.quality["black"], saved.manifest.quality["duplicate"]) == ([5], [9])
    text = stream.getvalue()
    assert "save set: 16/16" in text
    assert "1 of 16 images are black: 5" in text


@pytest.mark.parametrize("damage", ["gone", "truncated", "flipped", "other"])
def test_damaged_parts_are_noticed(tmp_path: Path, damage: str) -> None:
    ImageSet.from_tensors(_floats(50)).save(tmp_path / "set")
    part = tmp_path / "set/part-00000.parquet"
    content = part.read_bytes()
    if damage == "gone":
        part.unlink()
        with pytest.raises(DataError, match=r"part-00000\.parquet is missing"):
            ImageSet.open(tmp_path / "set")
        return
    if damage == "truncated":
        part.write_bytes(content[:-100])
    elif damage == "flipped":
        part.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    else:
        ImageSet.from_tensors(_floats(3)).save(tmp_path / "other")
        part.write_bytes((tmp_path / "other/part-00000.parquet").read_bytes())
    image_set = ImageSet.open(tmp_path / "set")
    with pytest.raises(DataError, match=r"part-00000\.parquet is damaged: its hash differs"):
        image_set.verify()
    for read in (lambda: image_set[0], lambda: image_set.labels, lambda: list(image_set.subset([3]).batches(1))):
        with pytest.raises(DataError, match=r"part-00000\.parquet is damaged: its hash differs"):
            read()


def test_a_part_is_held_against_its_hash_once_when_it_is_first_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthquant.data.image_set._PART_COUNT", 10)
    monkeypatch.setattr("synthquant.data.image_set._SAVED_TOGETHER", 10)
    monkeypatch.setattr("synthquant.data.parts._OPEN_FILES", 1)
    ImageSet.from_tensors(_floats(30)).save(tmp_path / "set")
    hashed = []
    monkeypatch.setattr("synthquant.data.parts.sha256_file", lambda path: hashed.append(path.name) or sha256_file(path))
    image_set = ImageSet.open(tmp_path / "set")
    assert hashed == []
    image_set.detached([12])
    assert hashed == ["part-00001.parquet"]
    for _ in range(2):
        list(image_set.batches(4))
    assert sorted(hashed) == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]


def test_every_flip_in_a_part_or_a_manifest_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    ImageSet.from_tensors(_floats(20), torch.arange(20)).save(folder)

    def content() -> tuple[object, ...]:
        image_set = ImageSet.open(folder)
        images = torch.stack([image for batch in image_set.batches(8) for image in batch.images])
        return image_set.fingerprint, image_set.manifest, images.numpy().tobytes()

    assert same_or_refused(folder / "part-00000.parquet", content, flips=22) == 22 + 6
    assert same_or_refused(folder / "manifest.json", content, flips=150) > 140


def test_verify_notices_a_part_that_vanished_later(tmp_path: Path) -> None:
    image_set = ImageSet.from_tensors(_floats(5)).save(tmp_path / "set")
    (tmp_path / "set/part-00000.parquet").unlink()
    with pytest.raises(DataError, match="is missing"):
        image_set.verify()
    with pytest.raises(DataError, match="is missing"):
        image_set[0]


def test_wrong_manifests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is not a finished image set: it has no manifest\.json"):
        ImageSet.open(tmp_path)
    ImageSet.from_tensors(_floats(5)).save(tmp_path / "set")
    path = tmp_path / "set/manifest.json"
    good = read_sealed_json(path)
    part = good["parts"][0]
    for change, message in (
        ({"version": 9}, "has format version 9, this release reads versions 1 to 2"),
        ({"count": 6}, "promises 6 images"),
        ({"colour": "red"}, "unknown setting 'colour'"),
        ({"count": -1}, "count = -1"),
        ({"parts": [{**part, "name": "../part-00000.parquet"}]}, r"parts\.0\.name = '\.\./part-00000\.parquet': "),
        ({"parts": [{**part, "name": "/etc/passwd"}]}, "name = '/etc/passwd': "),
        ({"parts": [part, part], "count": 10}, r"part-00000\.parquet is listed more than once"),
        ({"parts": [{**part, "sha256": "0"}]}, "sha256 = '0': "),
    ):
        write_sealed_json(path, {**good, **change})
        with pytest.raises(DataError, match=message):
            ImageSet.open(tmp_path / "set")
    for text, message in (("{", "is not a JSON file"), ("[]", "holds no fields")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            ImageSet.open(tmp_path / "set")


def test_a_set_of_the_first_format_is_read_and_says_the_second_when_it_is_written(tmp_path: Path) -> None:
    ImageSet.from_tensors(_floats(5)).save(tmp_path / "set")
    path = tmp_path / "set/manifest.json"
    write_json(path, {**read_sealed_json(path), "version": 1})
    again = ImageSet.open(tmp_path / "set").save(tmp_path / "again")
    assert (len(again), again.manifest.version) == (5, 2)
    write_json(path, {**read_json(path), "version": 2})
    with pytest.raises(DataError, match=r"manifest\.json lacks the hash that this package writes"):
        ImageSet.open(tmp_path / "set")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 4, 4), r"shape \[N, channels, height, width\], got \[3, 4, 4\]"),
        (torch.zeros(2, 0, 4, 4), "shape"),
        (torch.zeros(2, 3, 0, 4), "shape"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), r"uint8 or floats in 0\.\.1, got torch\.int64"),
    ],
)
def test_wrong_tensors_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageSet.from_tensors(images)


@pytest.mark.parametrize(
    "labels", [torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64)]
)
def test_wrong_labels_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match="labels must be 2 whole numbers"):
        ImageSet.from_tensors(_floats(2), labels)


def test_labels_beyond_the_named_classes_are_said() -> None:
    images = ImageSet.from_tensors(torch.zeros(2, 3, 4, 4), labels=torch.tensor([0, 5])).with_class_numbers([3, 1])
    with pytest.raises(DataError, match="a label is 5, and the image set names 2 classes"):
        _ = images.labels
