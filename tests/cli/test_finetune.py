from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Command

from synthquant.core.record import RunRecord
from synthquant.data.image_set import ImageSet
from synthquant.export.quant_config import read_config
from synthquant.finetune import fine_tuning

SMALL = ["--set", "iterations=6", "--set", "batch_size=4", "--set", "evaluations=3", "--device", "cpu"]


@pytest.fixture
def run(synthquant: Command, recipe: Path, tmp_path: Path) -> Path:
    """A finished run that made its own images."""
    out = tmp_path / "run"
    assert synthquant("run", recipe, "--out", out).status == 0
    return out


def metrics(folder: Path, stage: str = "finetune") -> dict[str, Any]:
    return RunRecord.load(folder / "run.json").stages[stage].metrics


def test_a_run_is_fine_tuned_into_a_run_like_any_other(
    synthquant: Command, run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    told = synthquant("finetune", run, "--out", out, "--trust-code", *SMALL)
    assert told.status == 0, told.err
    assert told.out.splitlines()[-1] == f"run: {out}, report: {out / 'report.html'}"
    found, record = metrics(out), RunRecord.load(out / "run.json")
    assert (
        found["method"] == "distill"
        and found["steps"] == 6
        and [point["step"] for point in found["points"]] == [0, 2, 4, 6]
    )
    assert record.recipe["quantize"]["run"] == str(run) and record.recipe["images"]["source"] == str(run / "images")
    assert metrics(out, "quantize")["units"] == metrics(run, "quantize")["units"]
    assert read_config(out / "last").float_model == read_config(out / "model").float_model
    assert "Fine-tuning" in (out / "report.html").read_text() and "Fine-tuning" not in (run / "report.html").read_text()
    assert not (out / "work").exists()
    page = tmp_path / "page.html"
    for command in (
        ("evaluate", out, "--data", data, "--trust-code", "--json"),
        ("export", out, "--out", tmp_path / "network.onnx", "--preset", "simulate", "--trust-code"),
        ("report", run, out, "--out", page),
        ("finetune", out, "--out", tmp_path / "again", "--trust-code", *SMALL),
    ):
        outcome = synthquant(*command)
        assert outcome.status == 0, outcome.err
    assert (
        str(out) in synthquant("finetune", run, "--out", out, "--trust-code", *SMALL).err
    )  # finished: read from there


def test_the_same_command_goes_on_to_the_same_bytes(
    synthquant: Command, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert synthquant("finetune", run, "--out", whole, "--trust-code", *SMALL).status == 0
    step, made = fine_tuning._Training._step, []

    def stop(self: Any, number: int, batch: Any) -> Any:
        made.append(number)
        if made == [1, 2, 3]:
            raise KeyboardInterrupt
        return step(self, number, batch)

    monkeypatch.setattr(fine_tuning._Training, "_step", stop)
    stopped = synthquant("finetune", run, "--out", killed, "--trust-code", *SMALL)
    assert stopped.status != 0 and "1 state of training" in stopped.err and "goes on from there" in stopped.err
    assert synthquant("finetune", run, "--out", killed, "--trust-code", *SMALL).status == 0
    assert made == [1, 2, 3, 3, 4, 5, 6]
    for name in ("model", "last"):
        one, other = (folder / name / "model.safetensors" for folder in (whole, killed))
        assert one.read_bytes() == other.read_bytes()
    assert metrics(whole) == metrics(killed)


def test_a_recipe_quantizes_and_fine_tunes_as_the_two_commands_do(
    synthquant: Command, recipe: Path, run: Path, tmp_path: Path
) -> None:
    out, tuned = tmp_path / "out", tmp_path / "tuned"
    settings = [f"--set=finetune.{one}" for one in ("method=distill", "iterations=6", "batch_size=4", "evaluations=3")]
    assert synthquant("run", recipe, "--out", out, *settings).status == 0
    assert synthquant("finetune", run, "--out", tuned, "--trust-code", *SMALL).status == 0
    assert metrics(out) == metrics(tuned)
    one, other = (folder / "model" / "model.safetensors" for folder in (out, tuned))
    assert one.read_bytes() == other.read_bytes()


def test_other_images_are_trained_on_where_they_are_given(
    synthquant: Command, run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    outcome = synthquant("finetune", run, "--images", data, "--out", out, "--trust-code", *SMALL, "--json")
    assert json.loads(outcome.out)["out"] == str(out)
    assert metrics(out, "images")["count"] == len(ImageSet.open(data)) == 21 and metrics(out)["held_out_count"] == 2


def test_what_is_wrong_is_said_in_one_line_and_leaves_nothing(
    synthquant: Command, run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tuned"
    for arguments, expected in (
        ((tmp_path / "none",), "run.json"),
        ((run,), "--trust-code"),
        ((run, "--trust-code", "--method", "distil"), "did you mean 'distill'"),
        ((run, "--trust-code", "--set", "weight_rate=1"), "weight_lr"),
        ((run, "--trust-code", "--images", tmp_path / "gone"), "gone"),
    ):
        error = synthquant("finetune", *arguments, "--out", out).error
        assert expected in error and not out.exists(), error
    assert synthquant("finetune", run, "--out", out, "--trust-code", *SMALL).status == 0
    other = synthquant("finetune", run, "--out", out, "--trust-code", *SMALL, "--set", "temperature=2")
    assert "holds a run of another recipe" in other.error
    shutil.rmtree(run / "model")
    assert "model" in synthquant("finetune", run, "--out", tmp_path / "new", "--trust-code", *SMALL).error
    assert not (tmp_path / "new").exists()
    shutil.rmtree(run / "images")
    assert "give some with --images" in synthquant("finetune", run, "--out", tmp_path / "new", "--trust-code").error
