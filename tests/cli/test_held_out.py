"""The stage `held_out` of a recipe: images of a method, images that exist, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.cli.conftest import Command
from tests.small_networks import small_images

from synthquant.core.advice import TOO_FEW, about_held_out
from synthquant.core.record import RunRecord
from synthquant.core.run_metrics import CheckpointMetrics, HeldOutMetrics

SOURCE = "outputs have "


def test_a_finished_run_is_given_images_held_out(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert SOURCE not in synthquant("run", recipe, "--out", run).out
    before = RunRecord.load(run / "run.json").metrics("checkpoint", CheckpointMetrics)
    outcome = synthquant("run", recipe, "--out", run, "--set", "held_out.count=8")
    record = RunRecord.load(run / "run.json")
    found = record.metrics("held_out", HeldOutMetrics)
    assert outcome.status == 0 and (found.count, found.held_out_count) == (9, 8)
    assert record.metrics("checkpoint", CheckpointMetrics) == before
    (line,) = [line for line in outcome.out.splitlines() if line.startswith(SOURCE)]
    assert line.endswith("8 held out") and f"{line[:1].upper()}{line[1:]}." in (run / "report.html").read_text()


def test_of_images_that_exist_those_are_held_out_that_are_not_drawn(
    synthquant: Command, recipe: Path, tmp_path: Path
) -> None:
    small_images(20, seed=4).save(tmp_path / "images")
    values = yaml.safe_load(recipe.read_text())
    values |= {"images": {"source": str(tmp_path / "images"), "count": 12}, "held_out": {"count": 8}}
    recipe.write_text(yaml.safe_dump(values))
    assert synthquant("run", recipe, "--out", tmp_path / "run").status == 0
    found = RunRecord.load(tmp_path / "run" / "run.json").metrics("held_out", HeldOutMetrics)
    assert (found.count, found.held_out_count) == (12, 8)
    said = synthquant("run", recipe, "--out", tmp_path / "two", "--set", "images.count=13").error
    assert "has 7 images beside those that the run uses; lower images.count" in said
    said = synthquant("run", recipe, "--out", tmp_path / "two", "--set", "images.count=null").error
    assert "has 0 images beside those" in said and not (tmp_path / "two").exists()


def test_chosen_images_have_none_like_them(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    chosen = ("--set", "held_out.count=8", "--set", "select=energy:0.7")
    assert "leave select or held_out out" in synthquant("run", recipe, "--out", tmp_path / "run", *chosen).error


@pytest.mark.parametrize(("gap", "error", "told"), [(2.9, 0.0, False), (3.1, 0.0, True), (3.9, 0.5, False)])
def test_a_gap_of_twice_the_error_and_beyond_chance_is_told(gap: float, error: float, told: bool) -> None:
    found = HeldOutMetrics(count=64, sqnr=20.0 + gap, held_out_count=8, held_out_sqnr=20.0, error=error)
    advice = about_held_out(found)
    assert (advice is not None) is told and TOO_FEW == 3.0
    assert advice is None or str(advice).endswith("the network learned its images by heart; quantize with more of them")
    assert about_held_out(HeldOutMetrics()) is None
