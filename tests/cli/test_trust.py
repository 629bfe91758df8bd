"""Files are data: code that a run, a checkpoint or an exported file names runs only if the user wants it to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cli.conftest import Command

from synthquant.core.errors import InputError, ModelError
from synthquant.export.checkpoint import load_checkpoint
from synthquant.models.float_model import ModelSource, RecordedSource
from synthquant.models.open import open_model

BOTH = "give --model {} or --trust-code (in Python trust_code=True)"


@pytest.fixture
def source(recipe: Path, model_options: list[str]) -> Path:
    """The file of a network that leaves a mark beside it whenever it is run."""
    path = Path(model_options[0].rpartition(":")[0])
    with path.open("a", encoding="utf-8") as file:
        file.write("\nfrom pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    return path


def has_run(source: Path) -> bool:
    """Whether the file was run since this was asked last."""
    mark = source.with_name("ran")
    found = mark.exists()
    mark.unlink(missing_ok=True)
    return found


@pytest.fixture
def run(source: Path, recipe: Path, synthquant: Command, tmp_path: Path) -> Path:
    """A run of that network; a recipe's words are the user's own, also to go on with it."""
    words = (
        "--out",
        tmp_path / "run",
        "--set",
        "quantize.scheme={preset: W8A8, weights: {symmetric: true}, deploy: full}",
    )
    assert synthquant("run", recipe, *words).status == 0 and has_run(source)
    assert synthquant("run", recipe, *words).status == 0
    has_run(source)
    return tmp_path / "run"


def test_commands_run_no_code_that_a_run_names(
    synthquant: Command, run: Path, source: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "net.pt2"
    for command in (
        ("evaluate", run, "--data", data),
        ("evaluate", run / "model", "--data", data),
        ("export", run, "--to", "torch", "--out", out),
    ):
        error = synthquant(*command).error
        assert "quant_config.json names code" in error and BOTH.format(f"{source}:build") in error
    assert synthquant("report", run, "--out", tmp_path / "page.html").status == 0
    assert not has_run(source) and not out.exists()


def test_a_user_who_names_it_or_trusts_it_runs_it(synthquant: Command, run: Path, source: Path, data: Path) -> None:
    rows = []
    for words in (("--trust-code",), ("--model", f"{source}:build")):
        rows.append(json.loads(synthquant("evaluate", run, "--data", data, "--json", *words).out))
        assert has_run(source)
    assert rows[0] == rows[1] | {"seconds": rows[0]["seconds"]} and rows[0]["agreement"] is not None


def test_the_file_that_the_user_names_is_the_one_that_runs(
    synthquant: Command, run: Path, source: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copy(source, tmp_path / "moved"))
    assert synthquant("evaluate", run, "--data", data, "--model", f"{moved}:build").status == 0
    assert has_run(moved) and not has_run(source)
    for other in (f"{moved}:other", f"{moved.with_name('other.py')}:build", "zoo/cifar10-resnet20"):
        error = synthquant("evaluate", run, "--data", data, "--model", other).error
        assert f"was made from {source}:build, not from {other}" in error
    assert (
        "--trust-code would change nothing"
        in synthquant("evaluate", f"{source}:build", "--data", data, "--trust-code").error
    )
    assert not has_run(moved) and not has_run(source)


def test_an_exported_file_is_measured_without_running_code(
    synthquant: Command, run: Path, source: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "net.onnx"
    assert synthquant("export", run, "--model", f"{source}:build", "--no-verify", "--out", file).status == 0
    assert has_run(source)
    measured = synthquant("evaluate", file, "--data", data, "--json")
    row = json.loads(measured.out)
    assert row["count"] == 21 and row["agreement"] is None
    assert f"{file} names code" in measured.err and BOTH.format(f"{source}:build") in " ".join(measured.err.split())
    assert f"{file} names code" in synthquant("benchmark", file).error
    assert "was made from" in synthquant("evaluate", file, "--data", data, "--model", "other.py:build").error
    assert not has_run(source)
    known = synthquant("evaluate", file, "--data", data, "--json", "--model", f"{source}:build")
    assert json.loads(known.out)["agreement"] is not None and has_run(source)


def test_a_network_at_hand_needs_no_trust(run: Path, source: Path) -> None:
    with pytest.raises(ModelError, match="names code"):
        load_checkpoint(run / "model")
    assert not has_run(source)
    sides = {"input_size": 16, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    model = open_model(f"{source}:build", **sides)
    has_run(source)
    assert load_checkpoint(run / "model", float_model=model).float_model is model
    assert not has_run(source)
    assert load_checkpoint(run / "model", model=f"{source}:build").float_model.source == model.source
    assert has_run(source)


def test_what_a_file_says_is_not_what_a_user_says(source: Path) -> None:
    recorded = RecordedSource.of(ModelSource(source=f"{source}:build", input_size=(16, 16)))
    has_run(source)
    with pytest.raises(InputError, match="valid string"):
        open_model(recorded)  # type: ignore[arg-type]
    assert not has_run(source)
    # Names of libraries run no code of the file's choice and need no leave.
    library = RecordedSource(source="timm/resnet18", num_classes=3)
    assert library.confirmed("FILE") == ModelSource(source="timm/resnet18", num_classes=3)
