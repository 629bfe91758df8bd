"""`export`, `evaluate FILE.onnx` and `benchmark` as users meet them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.cli.conftest import Command
from tests.small_networks import small_float_model

from synthquant.cli.export import _print_export as print_export
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from synthquant.export.quant_config import read_config
from synthquant.methods import EXPORTERS
from synthquant.nn.quant_model import QuantModel
from synthquant.pipeline import run as run_recipe
from synthquant.recipe import Recipe
from synthquant.runtimes import ExportedNetwork, SpeedTest

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a scheme that integer kernels take."""
    folder = tmp_path_factory.mktemp("exported")
    values = {
        "model": small_float_model(folder).source.model_dump(mode="json"),
        "images": {"method": "noise", "count": 9},
        "quantize": {"method": "rtn", "scheme": {"preset": "W8A8", "weights": {"symmetric": True}, "deploy": "full"}},
        "device": "cpu",
    }
    run_recipe(Recipe.parse(values), folder / "run")
    return folder / "run"


def test_export_evaluate_and_benchmark(synthquant: Command, run: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    exported = synthquant("export", run, "--trust-code", "--to", "onnx", "--preset", "ort-cpu", "--out", file)
    assert exported.status == 0, exported.err
    assert "agreement" in exported.out and "QLinearConv" in exported.out
    assert "7 of 8 layers run on integers" in exported.out
    assert not list(tmp_path.glob(".net.onnx*"))

    in_torch = json.loads(synthquant("evaluate", run, "--trust-code", "--data", data, "--json").out)
    in_runtime = json.loads(synthquant("evaluate", file, "--trust-code", "--data", data, "--json").out)
    assert in_runtime["count"] == 21 and in_runtime["runtime"] == "onnxruntime"
    assert abs(in_runtime["top1"] - in_torch["top1"]) <= 2 / 21 and in_runtime["agreement"] is not None
    assert synthquant("evaluate", file, "--data", data).out.startswith("network ")

    timed = synthquant(
        "benchmark", file, "--trust-code", "--seconds", "0.1", "--threads", "1", "--batch", "2", "--json"
    )
    measured = json.loads(timed.out)
    assert measured["speedup"] > 0 and measured["float"]["bytes"] > 0 and measured["batch"] == 2


def test_an_unverified_export_says_so(
    synthquant: Command, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.pt2"
    done = synthquant("export", run, "--trust-code", "--to", "torch", "--no-verify", "--out", file, "--json")
    result = json.loads(done.out)
    assert done.status == 0 and result["bytes"] == file.stat().st_size
    print_export(result)
    assert "not verified" in capsys.readouterr().out


def test_what_cannot_be_exported_is_one_line_and_no_file(
    synthquant: Command, recipe: Path, run: Path, data: Path, tmp_path: Path
) -> None:
    assert synthquant("run", recipe, "--out", tmp_path / "other", "--set", "quantize.scheme=W8A8").status == 0
    out = tmp_path / "net.onnx"
    assert (
        "cannot express the weights of" in synthquant("export", tmp_path / "other", "--trust-code", "--out", out).error
    )
    assert "unknown preset 'trt'" in synthquant("export", run, "--trust-code", "--preset", "trt", "--out", out).error
    assert (
        "--preset belongs to --to onnx"
        in synthquant("export", run, "--trust-code", "--to", "torch", "--preset", "simulate", "--out", out).error
    )
    assert (
        "unknown exporter 'tflite'" in synthquant("export", run, "--trust-code", "--to", "tflite", "--out", out).error
    )
    assert (
        "unknown setting 'agreement'"
        in synthquant("export", run, "--trust-code", "--set", "agreement=1", "--out", out).error
    )
    assert "is not the folder of a run" in synthquant("export", tmp_path / "none", "--out", out).error
    assert not out.exists() and not list(tmp_path.glob(".net.onnx*"))


def test_wrong_files_and_runtimes_are_one_line(synthquant: Command, run: Path, data: Path, tmp_path: Path) -> None:
    assert "no such file" in synthquant("evaluate", tmp_path / "none.onnx", "--data", data).error
    assert "no such file" in synthquant("benchmark", tmp_path / "none.onnx").error
    found = synthquant("evaluate", run, "--data", data, "--runtime", "openvino")
    assert "--runtime belongs to an exported file" in found.error


class Toy(Settings):
    """Checkpoints under a name of their own, run by PyTorch: an exporter from elsewhere."""

    suffix: ClassVar[str] = ".toy"
    runtimes: ClassVar[tuple[str, ...]] = ("loaded",)

    def export(self, quant_model: QuantModel, path: Path, *, origin: Mapping[str, str] | None = None) -> Path:
        return save_checkpoint(quant_model, path)

    def check(self, quant_model: QuantModel) -> None: ...

    def verify(
        self, quant_model: QuantModel, path: Path, images: ImageSet, *, progress: Progress = QUIET
    ) -> dict[str, Any]:
        return Checkpoint().verify(quant_model, path, images, progress=progress)

    @classmethod
    def open(cls, path: Path, runtime: str | None = None, *, threads: int | None = None) -> ExportedNetwork:
        assert runtime in cls.runtimes
        model, entry = load_checkpoint(path, trust_code=True), read_config(path).float_model
        return ExportedNetwork(
            function=lambda tensors: [model(tensors[0])],
            outputs=("logits",),
            task=entry.task,
            preprocess=model.float_model.preprocess,
            scheme=model.scheme,
            name=entry.name,
            source=entry.source,
            fingerprint=entry.fingerprint,
            num_classes=entry.num_classes,
            class_names=entry.class_names,
        )

    @classmethod
    def benchmark(cls, path: Path, test: SpeedTest, **_: object) -> dict[str, Any]:
        row = {"milliseconds": float(test.batch), "images_per_second": 1.0, "bytes": 1}
        ratios = {"speedup": 1.0, "size_ratio": 1.0, "batch": test.batch, "threads": test.threads}
        return {"float": row, "quantized": row, **ratios, "vnni": True, "environment": {"cpu": "toy"}}


def test_an_exporter_from_elsewhere_is_found_by_its_suffix(
    synthquant: Command, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert EXPORTERS.names()
    monkeypatch.setitem(EXPORTERS._own, "toy", Toy)
    file = tmp_path / "net.toy"
    assert synthquant("export", run, "--trust-code", "--to", "toy", "--out", file).status == 0
    found = json.loads(synthquant("evaluate", file, "--trust-code", "--data", data, "--json").out)
    run_row = json.loads(synthquant("evaluate", run, "--trust-code", "--data", data, "--json").out)
    assert found["runtime"] == "loaded"
    assert [found[key] for key in ("top1", "agreement", "kl")] == [run_row[key] for key in ("top1", "agreement", "kl")]
    timed = synthquant("benchmark", file, "--batch", 3, "--json")
    assert json.loads(timed.out)["quantized"]["milliseconds"] == 3
    assert "--preset belongs to --to onnx, not to --to toy" in (
        synthquant("export", run, "--to", "toy", "--preset", "simulate", "--out", tmp_path / "again.toy").error
    )
    listed = json.loads(synthquant("list", "export", "--json").out)["export"]
    assert listed["toy"] == "Checkpoints under a name of their own, run by PyTorch: an exporter from elsewhere."


def test_files_that_no_runtime_executes_are_named(synthquant: Command, data: Path, tmp_path: Path) -> None:
    said = synthquant("benchmark", tmp_path / "net.pt2").error
    assert "net.pt2 is no file that a runtime executes here; their names end in .onnx" in said


def test_images_that_differ_only_because_two_classes_are_nearly_tied_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"agreement": 0.75, "ties": 2, "mean_error": 0.01, "max_steps": None}
    found = {"images": 8, "optimized": row}
    print_export({"scheme": "W4A4", "out": "x.onnx", "bytes": 1, "verification": found})
    assert "agreement 75.00% on 8 images (2 others nearly tied)," in capsys.readouterr().out
