"""`export`, `evaluate FILE.onnx` and `benchmark` as users meet them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Command

from synthquant.cli.export import _print_export as print_export

pytest.importorskip("onnxruntime")


@pytest.fixture
def run(synthquant: Command, recipe: Path, tmp_path: Path) -> Path:
    """A finished run of a scheme that integer kernels take."""
    scheme = ["--set", "quantize.scheme={preset: W8A8, weights: {symmetric: true}, deploy: full}"]
    assert synthquant("run", recipe, "--out", tmp_path / "run", *scheme).status == 0
    return tmp_path / "run"


def test_export_evaluate_and_benchmark(synthquant: Command, run: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    exported = synthquant("export", run, "--trust-code", "--out", file, "--json")
    assert exported.status == 0, exported.err
    result = json.loads(exported.out)
    assert result["bytes"] == file.stat().st_size and result["verification"]["layers"]["integer"] == 7
    assert not list(tmp_path.glob(".net.onnx*"))

    in_torch = json.loads(synthquant("evaluate", run, "--trust-code", "--data", data, "--json").out)
    in_runtime = json.loads(synthquant("evaluate", file, "--trust-code", "--data", data, "--json").out)
    assert in_runtime["count"] == 21 and in_runtime["runtime"] == "onnxruntime"
    assert abs(in_runtime["top1"] - in_torch["top1"]) <= 2 / 21 and in_runtime["agreement"] is not None
    assert synthquant("evaluate", file, "--data", data).out.startswith("name")

    timed = synthquant(
        "benchmark", file, "--trust-code", "--seconds", "0.1", "--threads", "1", "--batch", "2", "--json"
    )
    measured = json.loads(timed.out)
    assert measured["speedup"] > 0 and measured["float"]["bytes"] > 0 and measured["batch"] == 2


def test_export_prints_what_matters(synthquant: Command, run: Path, tmp_path: Path) -> None:
    found = synthquant(
        "export", run, "--trust-code", "--to", "onnx", "--preset", "ort-cpu", "--out", tmp_path / "net.onnx"
    )
    assert found.status == 0
    assert "agreement" in found.out and "7 of 8 layers run on integers" in found.out and "QLinearConv" in found.out
    unverified = synthquant(
        "export", run, "--trust-code", "--to", "torch", "--no-verify", "--out", tmp_path / "net.pt2"
    )
    assert unverified.status == 0 and "not verified" in unverified.out


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
    assert "--runtime belongs to an exported FILE.onnx" in found.error


def test_images_that_differ_only_because_two_classes_are_nearly_tied_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"agreement": 0.75, "ties": 2, "mean_error": 0.01, "max_steps": None}
    found = {"images": 8, "optimized": row}
    print_export({"scheme": "W4A4", "out": "x.onnx", "bytes": 1, "verification": found})
    assert "agreement 75.00% on 8 images (2 others nearly tied)," in capsys.readouterr().out
