from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.small_networks import CLASSES, small_float_model, small_images

import synthquant as sq
from synthquant import measure, pipeline
from synthquant.core.errors import InputError, ModelError, RecipeError, UnsupportedModelError
from synthquant.core.files import sha256_file
from synthquant.core.progress import Bar, Progress
from synthquant.core.record import RunRecord
from synthquant.data.image_set import ImageSet
from synthquant.evaluate.data import Data
from synthquant.evaluate.section import EvaluateSection
from synthquant.export import TorchProgram
from synthquant.export.checkpoint import load_checkpoint
from synthquant.models.float_model import FloatModel
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize import Rtn
from synthquant.recipe import Recipe


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


class KillAt(Progress):
    """Kills the run when the bar called `title` has come to `step`."""

    def __init__(self, title: str, step: int) -> None:
        self.title, self.step = title, step

    def bar(self, title: str, total: int) -> Any:
        kill_step = self.step if self.title in title else None

        class Trap(Bar):
            def advance(self, steps: int = 1, **fields: float | str) -> None:
                super().advance(steps, **fields)
                if kill_step is not None and self.done >= kill_step:
                    raise Killed

        class Context:
            def __enter__(self) -> Bar:
                return Trap(title, total)

            def __exit__(self, *_: object) -> None:
                pass

        return Context()


class Listen(Progress):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FloatModel:
    return small_float_model(tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("given") / "data"
    small_images(21).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def recipe(model: FloatModel, data: str) -> dict[str, Any]:
    return {
        "model": model.source.model_dump(mode="json"),
        "images": {"method": "genie_d", "count": 11, "batch_size": 4, "iterations": 3, "latent_size": 8},
        "quantize": {"method": "genie_m", "scheme": "W4A4", "iterations": 4, "batch_size": 4},
        "evaluate": {"data": data, "batch_size": 8},
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def whole(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of it; do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pipeline.run(Recipe.parse(recipe), folder)
    return folder


STAGES = ["model", "images", "quantize", "checkpoint", "evaluate", "report"]
SELECT = ["energy:0.7", {"method": "bn_sensitivity", "keep": 4, "set_size": 6}]


@pytest.fixture(scope="module")
def choosing(recipe: dict[str, Any]) -> dict[str, Any]:
    """The quickest recipe that selects."""
    images, quantize = {"method": "noise", "count": 11, "batch_size": 4}, {"method": "rtn", "scheme": "W8A8"}
    return recipe | {"images": images, "select": SELECT, "quantize": quantize}


def files(folder: Path) -> dict[str, str]:
    """Hash of every file but those that hold the time."""
    paths = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("run.json", "report.html")
    ]
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths}


@pytest.fixture(scope="module")
def whole_choosing(choosing: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of that; do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    pipeline.run(Recipe.parse(choosing), folder)
    return folder


def test_a_run_leaves_everything_that_was_promised(recipe: dict[str, Any], model: FloatModel, whole: Path) -> None:
    record = RunRecord.load(whole / "run.json")
    names = {path.name for path in whole.iterdir()}
    assert names == {"recipe.yaml", "run.json", "images", "model", "report.html"}
    assert set(record.stages) == set(STAGES) and {stage.status for stage in record.stages.values()} == {"done"}
    assert len(ImageSet.open(whole / "images")) == 11
    assert Recipe.load(whole / "recipe.yaml") == Recipe.parse(recipe)
    assert record.stages["model"].metrics["fingerprint"] == model.fingerprint


def test_float_stands_beside_quantized(whole: Path) -> None:
    metrics = RunRecord.load(whole / "run.json").stages["evaluate"].metrics
    before, after = metrics["accuracy"]
    assert (before["name"], after["name"]) == ("float", "W4A4")
    assert after["recovery"] == pytest.approx(after["top1"] / before["top1"])
    assert after["size_bytes"] < before["size_bytes"]
    assert metrics["count"] == 21
    assert len(metrics["sqnr"]) == 8


def test_the_checkpoint_is_the_network_that_was_measured(whole: Path, data: str) -> None:
    section = Data.of(EvaluateSection(data=data, batch_size=8))
    row = measure.evaluate(whole, section, "cpu", trust_code=True)
    measured = RunRecord.load(whole / "run.json").stages["evaluate"].metrics["accuracy"][1]
    same = ("top1", "top5", "agreement", "kl", "recovery", "size_bytes", "count")
    assert {key: row[key] for key in same} == {key: measured[key] for key in same}
    assert measure.evaluate(whole / "model", section, "cpu", trust_code=True)["top1"] == row["top1"]


def test_equal_recipes_give_equal_files_and_another_seed_gives_others(
    recipe: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    for name, seed in (("b", 0), ("c", 1)):
        record = pipeline.run(Recipe.parse(recipe | {"seed": seed}), tmp_path / name)
        assert list(record.stages) == STAGES and record == RunRecord.load(tmp_path / name / "run.json")
    assert files(whole) == files(tmp_path / "b")
    assert files(whole)["model/model.safetensors"] != files(tmp_path / "c")["model/model.safetensors"]


@pytest.mark.parametrize(
    ("title", "step"), [("genie_d", 5), ("weights", 9), ("evaluate float", 8), ("evaluate quantized", 8)]
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    recipe: dict[str, Any], whole: Path, tmp_path: Path, title: str, step: int
) -> None:
    with pytest.raises(Killed):
        pipeline.run(Recipe.parse(recipe), tmp_path / "killed", KillAt(title, step))
    assert not (tmp_path / "killed" / "report.html").exists()
    pipeline.run(Recipe.parse(recipe), tmp_path / "killed")
    assert files(tmp_path / "killed") == files(whole)


def test_a_finished_run_is_read_not_repeated(recipe: dict[str, Any], whole: Path) -> None:
    first, source = RunRecord.load(whole / "run.json"), Path(recipe["model"]["source"].partition(":")[0])
    hidden = source.rename(source.with_suffix(".hidden"))
    try:
        assert pipeline.run(Recipe.parse(recipe), whole) == first
    finally:
        hidden.rename(source)


def test_a_run_of_other_weights_is_not_continued(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe | {"model": small_float_model(tmp_path).source.model_dump(mode="json")}
    with pytest.raises(Killed):
        pipeline.run(Recipe.parse(recipe), tmp_path / "run", KillAt("genie_d", 5))
    source = tmp_path / "small_network.py"
    source.write_text(source.read_text().replace("def build(seed=0)", "def build(seed=5)"))
    with pytest.raises(ModelError, match="was made with other weights"):
        pipeline.run(Recipe.parse(recipe), tmp_path / "run")


def test_without_evaluation_data_agreement_is_measured_on_the_images(recipe: dict[str, Any], tmp_path: Path) -> None:
    metrics = pipeline.run(Recipe.parse(recipe | {"evaluate": None}), tmp_path / "run").stages["evaluate"].metrics
    before, after = metrics["accuracy"]
    assert "top1" not in before and after["top1"] is None
    assert 0 < after["agreement"] <= 1
    assert metrics["data"] is None


def test_images_that_exist_are_used_as_they_are(recipe: dict[str, Any], data: str, tmp_path: Path) -> None:
    given = recipe | {
        "images": {"source": data, "count": 9},
        "quantize": {"method": "rtn", "scheme": "W8A8"},
    }
    record = pipeline.run(Recipe.parse(given), tmp_path / "run")
    metrics = record.stages["images"].metrics
    assert metrics.pop("suspicious")["looked_at"] == 9
    assert metrics.pop("diversity")["count"] == 9
    assert metrics == {"method": "given", "source": data, "count": 9}
    assert not (tmp_path / "run" / "images").exists()
    with pytest.raises(InputError, match=r"images.count is 99 but .* holds 21"):
        pipeline.run(Recipe.parse(given | {"images": {"source": data, "count": 99}}), tmp_path / "run2")
    assert not (tmp_path / "run2").exists()


def test_given_images_are_drawn_from_all_classes(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(Rtn, "apply", lambda self, model, images, rng, **_: seen.append(images) or 1 / 0)
    order = torch.arange(210) // 30  # as a folder of class folders would be read
    ImageSet.from_tensors(small_images(210)[0].image.expand(210, 3, 16, 16), labels=order).save(tmp_path / "sorted")
    given = recipe | {"images": {"source": str(tmp_path / "sorted")}, "quantize": {"method": "rtn", "scheme": "W8A8"}}
    with pytest.raises(ZeroDivisionError):
        pipeline.run(Recipe.parse(given), tmp_path / "run")
    assert set(seen[0].labels[:60].tolist()) == set(range(CLASSES))
    assert sorted(seen[0].labels.tolist()) == order.tolist()


def test_a_network_the_method_cannot_work_with_leaves_nothing_behind(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plain.py"
    path.write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))\n"
    )
    model = recipe["model"] | {"source": f"{path}:build"}
    with pytest.raises(UnsupportedModelError, match="no batch norm"):
        pipeline.run(Recipe.parse(recipe | {"model": model}), tmp_path / "runs" / "run")
    assert not (tmp_path / "runs").exists()


def test_broken_images_are_set_aside_and_told(recipe: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
        Image.new("RGB", (16, 16), (label * 30, 9, 99)).save(folder / str(label) / "a.png")
    (folder / "3" / "b.png").write_bytes(b"not an image")
    told = Listen()
    recipe = recipe | {
        "evaluate": str(folder),
        "images": {"method": "noise", "count": 4},
        "quantize": {"method": "rtn", "scheme": "W8A8"},
    }
    record = pipeline.run(Recipe.parse(recipe), tmp_path / "run", told)
    assert [entry["name"] for entry in record.stages["evaluate"].metrics["set_aside"]] == ["3/b.png"]
    assert any("1 image set aside" in text and "3/b.png" in text for text in told.warnings)


def test_loading_the_checkpoint_again_gives_the_same_logits(model: FloatModel, whole: Path) -> None:
    inputs = model.example_images(5, seed=1)
    with torch.no_grad():
        first = load_checkpoint(whole / "model", trust_code=True)(inputs)
        second = load_checkpoint(whole / "model", float_model=model)(inputs)
    assert torch.equal(first, second)


def test_the_record_is_plain_json(whole: Path) -> None:
    content = json.loads((whole / "run.json").read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["recipe"]["quantize"]["method"] == "genie_m"
    assert content["stages"]["quantize"]["peak_memory_bytes"] > 0


def test_a_selection_stands_between_images_and_quantization(
    choosing: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    apply = Rtn.apply
    monkeypatch.setattr(Rtn, "apply", lambda self, *args, **rest: seen.append(args[1]) or apply(self, *args, **rest))
    record = pipeline.run(Recipe.parse(choosing), tmp_path / "run")
    assert list(record.stages) == ["model", "images", "select", "quantize", "checkpoint", "evaluate", "report"]
    metrics = record.stages["select"].metrics
    assert (metrics["pool"], metrics["count"], metrics["rejected"]) == (11, 4, 7)
    assert [(row["method"], row["entered"], row["kept"]) for row in metrics["filters"]] == [
        ("energy", 11, 8),
        ("bn_sensitivity", 8, 4),
    ]
    assert set(metrics["bn_distance"]) == {"pool", "kept", "real"} and min(metrics["bn_distance"].values()) > 0
    kept = ImageSet.open(tmp_path / "run" / "selected")
    assert len(ImageSet.open(tmp_path / "run" / "images")) == 11 and len(kept) == 4
    assert seen[0].fingerprint == kept.fingerprint == metrics["fingerprint"]
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == Recipe.parse(choosing)
    summary = json.loads((tmp_path / "run" / "selected" / "selection.json").read_text())
    assert set(summary["pixels"]) == {"pool", "kept", "real"}  # the evaluation images stand beside


@pytest.mark.parametrize(("title", "step"), [("score images", 11), ("look at real", 9), ("save selected", 1)])
def test_a_run_killed_while_selecting_goes_on(
    choosing: dict[str, Any], whole_choosing: Path, tmp_path: Path, title: str, step: int
) -> None:
    with pytest.raises(Killed):
        pipeline.run(Recipe.parse(choosing), tmp_path / "killed", KillAt(title, step))
    assert not (tmp_path / "killed" / "selected").exists()
    pipeline.run(Recipe.parse(choosing), tmp_path / "killed")
    assert files(tmp_path / "killed") == files(whole_choosing)


def test_a_selection_of_given_images_needs_no_copy_of_them(choosing: dict[str, Any], data: str, tmp_path: Path) -> None:
    given = choosing | {
        "images": {"source": data, "count": 20},
        "select": "energy:5",
        "evaluate": None,
    }
    pipeline.run(Recipe.parse(given), tmp_path / "run")
    assert not (tmp_path / "run" / "images").exists()
    assert len(ImageSet.open(tmp_path / "run" / "selected")) == 5
    with pytest.raises(RecipeError, match="energy: 21 images are to stay but there are 20"):
        pipeline.run(Recipe.parse(given | {"select": ["energy:21"]}), tmp_path / "run2")
    assert not (tmp_path / "run2").exists()


def test_a_filter_that_does_not_fit_the_network_is_found_before_any_work(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="Network has no attention between the patches"):
        pipeline.run(Recipe.parse(recipe | {"select": ["patch_similarity:0.5"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_selection_may_be_changed_until_quantization_begins_and_not_after(
    choosing: dict[str, Any], tmp_path: Path
) -> None:
    plain = choosing | {"select": None}
    with pytest.raises(Killed):
        pipeline.run(Recipe.parse(plain), tmp_path / "run", KillAt("noise", 8))
    with pytest.raises(Killed):
        pipeline.run(Recipe.parse(choosing | {"select": ["energy:6"]}), tmp_path / "run", KillAt("evaluate float", 8))
    assert len(ImageSet.open(tmp_path / "run" / "selected")) == 6
    for other in (None, ["energy:7"]):
        with pytest.raises(InputError, match="holds a run of another recipe"):
            pipeline.run(Recipe.parse(choosing | {"select": other}), tmp_path / "run")
    with pytest.raises(Killed):
        pipeline.run(Recipe.parse(plain), tmp_path / "run2", KillAt("evaluate float", 8))
    with pytest.raises(InputError, match="holds a run of another recipe"):
        pipeline.run(Recipe.parse(choosing | {"select": ["energy:6"]}), tmp_path / "run2")


def test_the_python_of_the_readme_runs(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    _, code = re.findall(r"```python\n(.+?)```", readme, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    names: dict[str, Any] = {}
    exec(code, names)
    assert "top1" in capsys.readouterr().out
    assert isinstance(names["quant_model"], QuantModel)


def test_public_functions_take_names_as_well_as_paths(recipe: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    run, out = str(whole), str(tmp_path / "copy")
    sq.run(Recipe.parse(recipe), run)
    sq.load(run, trust_code=True).save(out)
    saved, of_run = files(Path(out)), files(Path(run) / "model")
    assert saved.pop("README.md") != of_run.pop("README.md"), "the card of the run says what it measured"
    assert saved == of_run
    record = RunRecord.load(f"{run}/run.json")
    record.save(f"{out}/run.json")
    assert RunRecord.load(f"{out}/run.json") == record
    assert sq.write_report([run], f"{out}.html").is_file()
    found = sq.export_run(run, TorchProgram(), f"{out}.pt2", trust_code=True)
    assert Path(f"{out}.pt2").is_file() and found["verification"]["loaded"]["agreement"] == 1.0
