"""`compare`: what it prints, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Command
from tests.report.run_folders import make_run

from synthquant import ImageSet
from synthquant.core.quality_file import read_quality

QUICK = ("--set", "resamples=5", "--set", "subsets=2", "--device", "cpu")


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Images of a quantized pipeline, of its float one, and real ones."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
    noise = torch.randint(-9, 10, images.shape, generator=generator)
    drawn = {"quantized": (images.int() + noise).clamp(0, 255).to(torch.uint8), "float": images}
    for name, made in drawn.items():
        settings = {"steps": 10 if name == "float" else 20, "eta": 0.0}
        columns = {"seed": list(range(12))}
        ImageSet.from_tensors(made, torch.arange(12) % 10, columns=columns, settings=settings).save(tmp_path / name)
    ImageSet.from_tensors(images.flip(0).roll(7, 2)).save(tmp_path / "real")
    return tmp_path / "quantized", tmp_path / "float", tmp_path / "real"


def test_compare_prints_what_it_found_and_keeps_it(
    synthquant: Command, sets: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    quantized, real, run = sets[0], sets[2], make_run(tmp_path / "run")
    page = tmp_path / "page.html"
    given = ("compare", quantized, real, "--baseline", sets[1], *QUICK, "--run", run, "--out", page)
    outcome = synthquant(*given, "--json")
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["features"] == "zoo/cifar10-resnet20, input of the last layer with weights (64 numbers)"
    assert found["images"] == str(quantized) and found["baseline"] == str(sets[1]) and found["count"] == 12
    assert found["same_seed"]["pairs"] == 12 and found["same_seed"]["psnr"]["value"] > 20
    assert found["relative"]["paired"] and found["settings"]["resamples"] == 5 and "torch" in found["environment"]
    assert found["class_agreement"]["difference"] is not None
    assert "steps 20 and 10" in outcome.err and "eta" not in outcome.err
    kept = read_quality(run)
    assert kept is not None and kept.frechet.value == found["frechet"]["value"]
    assert page.read_text().count("<img") == 24
    plain = synthquant(*given)
    assert plain.status == 0
    lines = [line.split("  ")[0] for line in plain.out.splitlines()]
    assert lines[0] == found["features"] and {"Frechet distance", "Precision %", "Recall %"} <= set(lines)
    assert f"{found['frechet']['value']:#.3g} (" in plain.out and "of the baseline" in plain.out and "[dB]" in plain.out


def test_compare_needs_a_run_to_keep_it_with(
    synthquant: Command, sets: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    outcome = synthquant("compare", sets[0], sets[1], *QUICK, "--run", tmp_path)
    assert outcome.status == 1 and outcome.out == "" and "is not the folder of a run" in outcome.error


def test_compare_of_too_few_images_is_one_line(
    synthquant: Command, sets: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    ImageSet.open(sets[0]).subset([0, 1]).save(tmp_path / "two")
    outcome = synthquant("compare", tmp_path / "two", sets[1], *QUICK)
    assert outcome.status == 1 and "2 images are too few to be compared; give 4 or more" in outcome.error
