"""What a selection leaves in its folder, from Python."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.damage import same_or_refused
from tests.select.networks import Tokens, float_model
from tests.small_networks import small_float_model, small_images

from synthquant.core.errors import DataError, OutputError
from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.select import BatchNormSensitivity, Energy, PatchSimilarity, write_selection
from synthquant.select.write import selection_metrics


class Listen(Progress):
    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, text: str) -> None:
        self.told.append(text)

    def say(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


def test_the_set_keeps_where_its_images_come_from(model: FloatModel, tmp_path: Path) -> None:
    pixels = small_images(9)
    pool = ImageSet.from_tensors(torch.stack([pixels[index].image for index in range(9)]), method="noise", seed=4)
    kept = write_selection(tmp_path / "out", pool, model, [Energy(keep=4)], Rng(0))
    assert (kept.manifest.method, kept.manifest.seed, kept.manifest.framing) == ("noise", 4, "cropped")
    assert len(kept) == kept.manifest.count == 4
    kept.verify()


def test_it_is_read_again_only_if_everything_is_the_same(model: FloatModel, tmp_path: Path) -> None:
    listen = Listen()
    arguments = (small_images(9), model, [BatchNormSensitivity(keep=4)])
    first = write_selection(tmp_path / "out", *arguments, Rng(0))
    again = write_selection(tmp_path / "out", *arguments, Rng(0), batch_size=2, progress=listen)
    assert again.fingerprint == first.fingerprint
    assert listen.told == [f"{tmp_path / 'out'}: this selection is finished; it is read from there"]
    other = float_model(Tokens("fused"), "tokens")
    for changed, differs in (
        ((small_images(10), *arguments[1:], Rng(0)), "images"),
        ((arguments[0], other, [PatchSimilarity(keep=4)], Rng(0)), "model, preprocess, filters|model, filters"),
        ((*arguments, Rng(1)), "seed"),
    ):
        with pytest.raises(OutputError, match=rf"holds another selection \(other ({differs})\)"):
            write_selection(tmp_path / "out", *changed)


def test_images_of_a_finished_selection_that_are_damaged_are_made_again(model: FloatModel, tmp_path: Path) -> None:
    arguments = (tmp_path / "out", small_images(9), model, [Energy(keep=4)], Rng(0))
    write_selection(*arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for name in ("part-00000.parquet", "rejected/part-00000.parquet", "rejected/manifest.json"):
        path, listen = tmp_path / "out" / name, Listen()
        path.write_bytes(before[path][:100] + b"?" + before[path][101:])
        write_selection(*arguments, progress=listen)
        assert len(listen.told) == 1 and name in listen.told[0] and "the selection is made again" in listen.told[0]
        assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_summary_is_refused(model: FloatModel, tmp_path: Path) -> None:
    arguments = (tmp_path / "out", small_images(9), model, [Energy(keep=4)], Rng(0))
    write_selection(*arguments)

    def again() -> object:
        return write_selection(*arguments).fingerprint, selection_metrics(tmp_path / "out")

    assert same_or_refused(tmp_path / "out" / "selection.json", again, flips=60) > 50


def test_warnings_speak_of_the_folder_that_was_asked_for(model: FloatModel, tmp_path: Path) -> None:
    listen = Listen()
    twice = small_images(9).subset([0, 1, 2, 0, 1, 2])
    write_selection(tmp_path / "out", twice, model, [Energy(keep=1.0)], Rng(0), progress=listen)
    assert listen.told == [f"{tmp_path / 'out'}: 3 of 6 images are duplicates of earlier ones: 3, 4, 5"]


def test_batch_norms_are_compared_where_it_is_asked_for_and_cheap(model: FloatModel, tmp_path: Path) -> None:
    pool, real = small_images(9), small_images(5, seed=1)

    def distances(name: str, **options: object) -> list[str] | None:
        filters = [BatchNormSensitivity(keep=4)] if "bn" in name else [Energy(keep=4)]
        write_selection(tmp_path / name, pool, model, filters, Rng(0), **options)  # type: ignore[arg-type]
        found = selection_metrics(tmp_path / name)["bn_distance"]
        return found and list(found)

    assert distances("energy") is None
    assert distances("bn") == ["pool", "kept"]
    assert distances("energy beside real", real=real) == ["pool", "kept", "real"]
    assert distances("energy of a large pool", real=real, table_gib=0.0) is None
    assert distances("bn of a large pool", real=real, table_gib=0.0) == ["pool", "kept", "real"]
    pixels = json.loads((tmp_path / "energy of a large pool" / "selection.json").read_text())["pixels"]
    assert set(pixels) == {"pool", "kept", "real"}


def test_a_filter_that_leads_away_from_the_batch_norms_is_told(tmp_path: Path) -> None:
    pool, model = open_images("bundled/cifar10-test").subset(range(150)), open_model("zoo/cifar10-resnet20")
    for keep, told in ((0.95, False), (0.3, True)):
        listen = Listen()
        write_selection(tmp_path / str(keep), pool, model, [BatchNormSensitivity(keep=keep)], Rng(0), progress=listen)
        distances = selection_metrics(tmp_path / str(keep))["bn_distance"]
        assert (distances["kept"] > 1.5 * distances["pool"]) is told
        assert any("farther from the batch norms than the pool" in text for text in listen.told) is told


def test_what_a_killed_process_left_beside_is_removed(model: FloatModel, tmp_path: Path) -> None:
    (tmp_path / ".out.0123456789ab.tmp").mkdir()
    (tmp_path / ".out.0123456789ab.tmp" / "part-00000.parquet").touch()
    (tmp_path / ".other.0123456789ab.tmp").mkdir()
    write_selection(tmp_path / "out", small_images(5), model, [Energy(keep=4)], Rng(0))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".other.0123456789ab.tmp"]


def test_nothing_is_left_when_something_fails(model: FloatModel, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write_selection(tmp_path / "a" / "out", small_images(3), model, [Energy(keep=4)], Rng(0))
    assert not (tmp_path / "a").exists()
