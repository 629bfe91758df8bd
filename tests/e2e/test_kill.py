"""A real process, really killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.killed import finish, kill_when, start
from tests.small_networks import small_float_model, small_images

from synthquant.core.files import sha256_file
from synthquant.core.record import RunRecord


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose parts and units take a noticeable time each."""
    small_images(8).save(tmp_path / "data")
    values = {
        "model": small_float_model(tmp_path).source.model_dump(mode="json"),
        "images": {"method": "genie_d", "count": 8, "batch_size": 4, "iterations": 30, "latent_size": 8},
        "quantize": {"method": "genie_m", "scheme": "W4A4", "iterations": 40, "batch_size": 4},
        "evaluate": {"data": str(tmp_path / "data")},
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def files(folder: Path) -> dict[str, str]:
    """Hash of every file of images, checkpoint and recipe."""
    paths = [folder / "recipe.yaml", *sorted((folder / "images").iterdir()), *sorted((folder / "model").iterdir())]
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths}


def test_a_run_killed_in_synthesis_and_in_reconstruction_ends_with_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish("run", recipe, "--out", whole)
    command = ("run", recipe, "--out", killed)
    kill_when(start(*command), killed / "images" / "part-00000.parquet")
    assert RunRecord.load(killed / "run.json").stages["images"].status == "running"
    assert not (killed / "images" / "manifest.json").exists()
    kill_when(start(*command), killed / "work" / "weights" / "unit-0001.safetensors")
    assert RunRecord.load(killed / "run.json").stages["quantize"].status == "running"
    finish(*command)
    assert files(killed) == files(whole)
    assert not (killed / "work").exists()
    leftovers = [path for path in killed.rglob("*") if path.name.endswith(".tmp")]
    assert not leftovers
