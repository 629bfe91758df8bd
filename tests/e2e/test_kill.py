"""A real process, really killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tests.small_networks import small_float_model, small_images

from synthquant.core.files import sha256_file
from synthquant.core.record import RunRecord

COMMAND = [sys.executable, "-c", "from synthquant.cli import main; main()", "run"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose parts and units take a noticeable time each."""
    small_images(8).save(tmp_path / "data")
    values = {
        "model": small_float_model(tmp_path).source.model_dump(mode="json"),
        "images": {"method": "genie_d", "count": 12, "batch_size": 4, "iterations": 40, "latent_size": 8},
        "quantize": {"method": "genie_m", "scheme": "W4A4", "iterations": 60, "batch_size": 4},
        "evaluate": {"data": str(tmp_path / "data")},
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def files(folder: Path) -> dict[str, str]:
    """Hash of every file of images, checkpoint and recipe."""
    paths = [folder / "recipe.yaml", *sorted((folder / "images").iterdir()), *sorted((folder / "model").iterdir())]
    return {str(path.relative_to(folder)): sha256_file(path) for path in paths}


def kill_when(command: list[str], appears: Path) -> None:
    """Start a command and kill it (SIGKILL) as soon as a file is there."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not appears.exists():
        assert process.poll() is None, f"the run ended before {appears} was there"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_run_killed_in_synthesis_and_in_reconstruction_ends_with_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*COMMAND, str(recipe), "--out", str(whole)], check=True, capture_output=True)
    command = [*COMMAND, str(recipe), "--out", str(killed)]
    kill_when(command, killed / "images" / "part-00000.parquet")
    assert RunRecord.load(killed / "run.json").stages["images"].status == "running"
    assert not (killed / "images" / "manifest.json").exists()
    kill_when(command, killed / "work" / "weights" / "unit-0001.safetensors")
    assert RunRecord.load(killed / "run.json").stages["quantize"].status == "running"
    subprocess.run(command, check=True, capture_output=True)
    assert files(killed) == files(whole)
    assert not (killed / "work").exists()
    leftovers = [path for path in killed.rglob("*") if path.name.endswith(".tmp")]
    assert not leftovers
