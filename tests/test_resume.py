"""What a run keeps whatever goes wrong, what it makes again, and what it refuses."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_networks import small_float_model, small_images

from synthquant import pipeline
from synthquant.core.errors import DataError, InputError, OutputError, SynthquantError
from synthquant.core.files import sha256_file
from synthquant.core.progress import Progress
from synthquant.core.record import RunRecord
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import save_checkpoint
from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import Rtn, unit_fit
from synthquant.recipe import Recipe


class Listen(Progress):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The quickest recipe with all stages."""
    folder = tmp_path_factory.mktemp("given")
    small_images(21).save(folder / "data")
    return {
        "model": small_float_model(folder).source.model_dump(mode="json"),
        "images": {"method": "noise", "count": 11, "batch_size": 4},
        "select": ["energy:0.7"],
        "quantize": {"method": "rtn", "scheme": "W8A8"},
        "evaluate": {"data": str(folder / "data"), "batch_size": 8},
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def original(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    pipeline.run(Recipe.parse(recipe), folder)
    return folder


@pytest.fixture
def finished(original: Path, tmp_path: Path) -> Path:
    """A finished run of it."""
    return shutil.copytree(original, tmp_path / "run")


def files(folder: Path) -> dict[str, str]:
    """Hash of every file but the one that holds the time."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths}


@pytest.mark.parametrize(
    "gone",
    [
        *("images", "images/part-00001.parquet", "images/manifest.json", "selected", "selected/selection.json"),
        *("selected/part-00000.parquet", "model", "model/model.safetensors", "model/quant_config.json"),
        *("report.html", "recipe.yaml"),
    ],
)
def test_what_is_gone_or_damaged_in_a_finished_run_is_made_again(
    finished: Path, recipe: dict[str, Any], gone: str
) -> None:
    run, told = finished, Listen()
    first, whole = RunRecord.load(run / "run.json"), files(run)
    for damage in (False, True):
        told.warnings.clear()
        if damage and (run / gone).is_file():
            data = bytearray((run / gone).read_bytes())
            data[len(data) // 2] ^= 4
            (run / gone).write_bytes(data)
        elif (run / gone).is_dir():
            shutil.rmtree(run / gone)
        else:
            (run / gone).unlink()
        again = pipeline.run(Recipe.parse(recipe), run, told)
        assert files(run) == whole
        assert again.stages["evaluate"] == first.stages["evaluate"]
        named = run / gone.partition("/")[0]
        assert gone == "recipe.yaml" or any(text.startswith(f"{named} is ") for text in told.warnings)
    told.warnings.clear()
    assert pipeline.run(Recipe.parse(recipe), run, told) == again == RunRecord.load(run / "run.json")
    assert told.warnings == []


def test_half_made_images_that_do_not_say_what_they_are_go_with_a_word_and_a_link_stays(
    finished: Path, recipe: dict[str, Any], tmp_path: Path
) -> None:
    record, told, whole = RunRecord.load(finished / "run.json"), Listen(), files(finished / "images")
    (finished / "images").rename(tmp_path / "elsewhere")
    (finished / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "manifest.json").unlink()
    record.stages["images"].status = "failed"
    record.save(finished / "run.json")
    pipeline.run(Recipe.parse(recipe), finished, told)
    assert told.warnings[0].startswith(f"{finished / 'images'} does not say what it holds (parts.json is gone)")
    assert (finished / "images").is_symlink() and files(tmp_path / "elsewhere") == whole


def test_another_network_in_the_place_of_a_runs_own_is_not_taken_for_it(finished: Path, recipe: dict[str, Any]) -> None:
    whole = files(finished)
    model = open_model(Recipe.parse(recipe).model, device="cpu")
    other = QuantModel.build(model, QuantScheme.parse("W2A8"))
    Rtn().apply(other, small_images(8), Rng(0))
    shutil.rmtree(finished / "model")
    save_checkpoint(other, finished / "model")
    pipeline.run(Recipe.parse(recipe), finished)
    assert files(finished) == whole


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, 2], "data: 1 of 4 images have no label; label them all, or leave these out"),
        ([0, 1, 2, 900], "has labels up to 900 but Network has 7 classes"),
    ],
)
def test_labels_are_checked_before_any_work(
    recipe: dict[str, Any], tmp_path: Path, labels: list[int], message: str
) -> None:
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    ImageSet.from_tensors(pixels, labels=torch.tensor(labels)).save(tmp_path / "bad" / "data")
    with pytest.raises(DataError, match=message):
        pipeline.run(Recipe.parse(recipe | {"evaluate": str(tmp_path / "bad" / "data")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unlabelled_data_is_said_before_any_work_and_gives_agreement(recipe: dict[str, Any], tmp_path: Path) -> None:
    ImageSet.from_tensors(torch.zeros(4, 3, 16, 16, dtype=torch.uint8)).save(tmp_path / "plain")
    told = Listen()
    record = pipeline.run(Recipe.parse(recipe | {"evaluate": str(tmp_path / "plain")}), tmp_path / "run", told)
    assert any("plain has no labels: agreement" in text for text in told.warnings)
    _, after = record.stages["evaluate"].metrics["accuracy"]
    assert after["top1"] is None and after["agreement"] is not None


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("run_stages.save_checkpoint", OSError(errno.ENOSPC, "No space left on device")),
        ("run_stages.float_beside_quantized", DataError("no")),
        ("pipeline.write_report", OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_whatever_goes_wrong_after_quantization_its_units_stay(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    learning = Recipe.parse(
        recipe | {"quantize": {"method": "adaround", "scheme": "W4A8", "iterations": 2, "batch_size": 4}}
    )
    run = tmp_path / "run"
    with monkeypatch.context() as failing:
        failing.setattr(f"synthquant.{stage}", fail)
        full = f"what is finished stays in {run}: make room and give the same command again to go on from there$"
        with pytest.raises(SynthquantError, match="^no$" if isinstance(error, DataError) else full):
            pipeline.run(learning, run)
    assert any("work/weights/unit-" in name for name in files(run))
    learned: list[int] = []
    monkeypatch.setattr(unit_fit, "learn_unit", lambda *_, **__: learned.append(1))
    pipeline.run(learning, run)
    assert learned == [] and (run / "report.html").is_file() and not (run / "work").exists()


def test_a_second_run_of_the_same_folder_is_refused_while_the_first_goes_on(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    run, refused = tmp_path / "run", []

    class Second(Progress):
        def bar(self, title: str, total: int) -> Any:
            if title == "evaluate quantized":
                with pytest.raises(OutputError) as error:
                    pipeline.run(Recipe.parse(recipe), run)
                refused.append(str(error.value))
            return super().bar(title, total)

    record = pipeline.run(Recipe.parse(recipe), run, Second())
    assert len(refused) == 1 and refused[0].startswith(f"{run} is being written by process {os.getpid()} (")
    assert record.stages["report"].status == "done"


def test_a_refusal_names_first_what_tells_two_runs_apart(finished: Path, recipe: dict[str, Any]) -> None:
    other = recipe | {
        "model": recipe["model"] | {"source": "zoo/cifar10-resnet20"},
        "quantize": {"method": "genie_m", "scheme": "W2A4"},
        "evaluate": recipe["evaluate"] | {"batch_size": 9},
    }
    with pytest.raises(InputError) as refused:
        pipeline.run(Recipe.parse(other), finished)
    text = str(refused.value)
    assert "(model.source is " in text and "'zoo/cifar10-resnet20' now; quantize.scheme" in text
    assert re.search(r"and \d+ more\)", text) and "batch_size" not in text
