"""`sample`: float, quantized and exported pipelines from one seed, and what is said of other steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from tests import small_diffusion as small
from tests.cli.conftest import Command
from tests.small_quantized import tiny

from synthquant import ImageSet


def test_float_run_and_exported_folder_are_sampled_alike(synthquant: Command, tmp_path: Path) -> None:
    source = f"diffusers/{small.saved(tiny(), tmp_path / 'pipeline')}"
    calibration, run, folder = tmp_path / "calibration", tmp_path / "run", tmp_path / "folder"
    given = (
        "--method",
        "self_sampling",
        "--count",
        4,
        "--set",
        "steps=2",
        "--set",
        "sampler_steps=4",
        "--device",
        "cpu",
    )
    assert synthquant("synthesize", source, *given, "--out", calibration).status == 0
    given = ("--images", calibration, "--method", "rtn", "--scheme", "W4A8", "--device", "cpu", "--out", run)
    assert synthquant("quantize", source, *given).status == 0
    exported = synthquant("export", run, "--to", "diffusers", "--out", folder, "--json")
    assert exported.status == 0, exported.err
    assert json.loads(exported.out)["verification"]["drawn"] == 2
    shown = synthquant("export", run, "--to", "diffusers", "--out", tmp_path / "shown")
    assert shown.status == 0 and "on 4 samples" in shown.out, shown.err
    sets = {}
    for name, drawn_by, steps in (("float", source, 4), ("run", run, 4), ("folder", folder, 4), ("other", folder, 5)):
        out = tmp_path / f"{name}-images"
        found = synthquant(
            "sample", drawn_by, "--count", 3, "--steps", steps, "--device", "cpu", "--out", out, "--json"
        )
        assert found.status == 0, found.err
        assert json.loads(found.out)["count"] == 3
        assert ("calibrated on 4 steps of the sampler and is sampled with 5" in found.err) == (name == "other")
        sets[name] = ImageSet.open(out)
    assert sets["float"].column("seed") == sets["run"].column("seed") == sets["other"].column("seed")
    images = {name: [one[index].image for index in range(3)] for name, one in sets.items()}
    assert all((a == b).all() for a, b in zip(images["run"], images["folder"], strict=True))
    assert not all((a == b).all() for a, b in zip(images["run"], images["float"], strict=True))
    again = synthquant("sample", run, "--count", 3, "--steps", 4, "--device", "cpu", "--out", tmp_path / "float-images")
    assert again.status == 1 and "holds other images" in again.error
    said = synthquant("sample", run, "--count", 3, "--set", "scheduler=ddpm", "--set", "steps=4", "--device", "cpu",
                      "--out", tmp_path / "ddpm-images")  # fmt: skip
    assert "calibrated with DDIMScheduler and is sampled with DDPMScheduler" in said.err or said.status == 1
    inside = synthquant("sample", run, "--out", run / "images", "--device", "cpu")
    assert inside.status == 1 and "lies inside" in inside.error
