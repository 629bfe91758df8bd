"""A recipe that ends with a file: exported, compared and measured in one run, and taken up again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from tests.cli.conftest import Command
from tests.small_networks import small_float_model, small_images

from synthquant import pipeline
from synthquant.core.errors import RecipeError, SchemeError, UnknownNameError
from synthquant.evaluate.section import EvaluateSection
from synthquant.export.onnx import Onnx
from synthquant.export.onnx.runtime import read_metadata
from synthquant.export.torch_program import TorchProgram
from synthquant.export_stages import BenchmarkStage, ExportStage
from synthquant.recipe import Recipe


def values(folder: Path, **sections: Any) -> dict[str, Any]:
    small_float_model(folder)
    form = {"input_size": [16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    return {
        "model": {"source": f"{folder}/small_network.py:build", **form},
        "images": {"method": "noise", "count": 8},
        "quantize": {"method": "rtn", "target": "ort-cpu", "scheme": "W8A8"},
        "device": "cpu",
        **sections,
    }


def test_one_file_says_the_whole_flow_and_what_is_gone_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synthquant: Command
) -> None:
    monkeypatch.setattr(Onnx, "rehearse", lambda *_: None)  # it costs seconds here, and has tests of its own
    measured: list[int] = []

    def speed(path: Path, test: Any, **_: Any) -> dict[str, Any]:
        assert read_metadata(path).preset == "ort-cpu"
        measured.append(test.threads)
        return {"speedup": 1.5, "batch": test.batch, "threads": test.threads}

    monkeypatch.setattr(Onnx, "benchmark", speed)
    recipe = tmp_path / "recipe.yaml"
    sections = {"benchmark": {"threads": 1}, "export": {"min_agreement": 0.5, "max_mean_error": 0.5}}
    recipe.write_text(yaml.safe_dump(values(tmp_path, **sections)))
    done = synthquant("run", str(recipe), "--out", str(tmp_path / "run"))
    assert done.status == 0, done.err
    assert f"exported: {tmp_path / 'run' / 'model.onnx'}" in done.out and "speed: 1.50x float" in done.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "in model.onnx" in page and "as fast as float, batch 1, 1 threads" in page
    assert Recipe.load(tmp_path / "run" / "recipe.yaml") == Recipe.load(recipe)
    (tmp_path / "run" / "model.onnx").unlink()
    again = synthquant("run", str(recipe), "--out", str(tmp_path / "run"), "--json")
    assert "model.onnx is gone: it is made again" in again.err and measured == [1, 1]
    assert json.loads(again.out)["export"]["verification"]["optimized"]["agreement"] >= 0.5


def run_of(recipe: Recipe, *done: str) -> Any:
    folder = SimpleNamespace(path=Path("run"), is_done=lambda name: name in done)
    folder.record = SimpleNamespace(recipe=recipe.resolved())
    return cast(Any, SimpleNamespace(recipe=recipe, folder=folder))


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"export": {"target": "nix"}}, UnknownNameError, "unknown target 'nix'"),
        ({"export": {"min_agreemen": 1}}, RecipeError, "did you mean 'min_agreement'"),
        ({"export": {"preset": "ort-cpu"}}, RecipeError, "leave 'preset' out"),
        ({"export": {}, "quantize": {"method": "rtn", "scheme": "W8A8"}}, RecipeError, "name a target"),
        ({"export": {"target": "torch"}, "benchmark": {}}, RecipeError, r"no runtime here executes model\.pt2"),
        ({"benchmark": {}}, RecipeError, "'benchmark' belongs to 'export'"),
        (
            {"export": {"target": "ort-cpu"}, "quantize": {"method": "rtn", "scheme": "W8A8"}},
            SchemeError,
            "may not express the weights of stem",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_before_any_work(
    sections: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for exporter in (Onnx, TorchProgram):
        monkeypatch.setattr(exporter, "rehearse", lambda *_: None)
    with pytest.raises(error, match=message):
        pipeline.run(Recipe.parse(values(tmp_path, **sections)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_folders_are_written_beside_the_runs_own(tmp_path: Path) -> None:
    recipe = Recipe.parse(values(tmp_path, export={"target": "checkpoint"}))
    stage = cast(ExportStage, recipe.added["export"])
    assert stage.files(run_of(recipe).folder) == Path("run/exported")
    assert cast(ExportStage, ExportStage()).files(run_of(recipe).folder) == Path("run/model.onnx")
    with pytest.raises(RecipeError, match="no runtime here executes exported"):
        BenchmarkStage().check(run_of(recipe))


def test_as_many_images_as_asked_for_are_measured_from_the_whole_set(tmp_path: Path) -> None:
    small_images(10).save(tmp_path / "data")
    found = EvaluateSection(data=str(tmp_path / "data"), limit=4).open()
    assert found.labels is not None and found.labels.tolist() == [0, 2, 5, 0]
    assert len(EvaluateSection(data=str(tmp_path / "data"), limit=40).open()) == 10
