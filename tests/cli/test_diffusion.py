"""Diffusion models by the commands that people type, and a recording that is really killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.cli.conftest import Command
from tests.killed import kill_when, start

pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

from tests import small_diffusion as small

import synthquant as sq
from synthquant.core.errors import InputError
from synthquant.core.files import sha256_file
from synthquant.core.progress import QUIET
from synthquant.make import given_images
from synthquant.recipe import SourceSection


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.saved(small.ddim(), tmp_path_factory.mktemp("pipeline") / "ddim")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.saved(small.ddim(seed=1), tmp_path_factory.mktemp("pipeline") / "other")


def recording(source: object, out: Path, *more: str, count: int = 8) -> list[str]:
    settings = ["sampler_steps=4", "steps=2", "batch_size=2", *more]
    options = [option for setting in settings for option in ("--set", setting)]
    return ["synthesize", str(source), "--method", "self_sampling", "--count", str(count), "--out", str(out), *options]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def test_record_and_quantize(synthquant: Command, folder: Path, other: Path, tmp_path: Path) -> None:
    calib, out = tmp_path / "calib", tmp_path / "run"
    made = json.loads(synthquant(*recording(f"diffusers/{folder}", calib), "--json").out)
    assert made["count"] == 8 and made["fingerprint"] == sq.open_trajectory(calib).fingerprint
    quantize = ("--images", calib, "--scheme", "W4A8", "--method", "rtn", "--out")
    outcome = synthquant("quantize", folder, *quantize, out, "--json")
    assert outcome.status == 0 and json.loads(outcome.out)["count"] == 8
    loaded = sq.load(out / "model")
    assert loaded.float_model.task == "denoise" and loaded.scheme.name == "W4A8"
    page = (out / "report.html").read_text()
    assert f"Quantized with 8 rows that diffusers/{folder} sampled of itself: 4 images at 2 of 4 steps" in page
    refused = synthquant("quantize", other, *quantize, tmp_path / "second").error
    assert f"{calib} is a trajectory of another pipeline" in refused and not (tmp_path / "second").exists()
    refused = synthquant("quantize", "zoo/cifar10-resnet20", *quantize, tmp_path / "second").error
    assert "is a trajectory of" in refused and "cifar10-resnet20 is no denoiser" in refused


def test_the_first_rows_of_a_trajectory(synthquant: Command, folder: Path, tmp_path: Path) -> None:
    lines = synthquant(*recording(folder, tmp_path / "calib")).out.splitlines()
    assert lines[0] == f"8 rows of a trajectory in {tmp_path / 'calib'}" and lines[1].startswith(
        "next: synthquant quantize"
    )
    model = sq.open_model(str(folder))
    some = given_images(SourceSection(source=str(tmp_path / "calib"), count=3), model, 0, QUIET)
    assert isinstance(some, sq.Trajectory) and some.steps.tolist() == [0, 2, 0]
    assert some.fingerprint != sq.open_trajectory(tmp_path / "calib").fingerprint
    with pytest.raises(InputError, match=r"images.count is 9 but .* holds 8"):
        given_images(SourceSection(source=str(tmp_path / "calib"), count=9), model, 0, QUIET)


def test_a_recipe_records_and_quantizes_and_is_taken_up(synthquant: Command, folder: Path, tmp_path: Path) -> None:
    images = {"method": "self_sampling", "count": 4, "sampler_steps": 2, "steps": 2}
    values = {"model": str(folder), "images": images, "quantize": {"method": "rtn", "scheme": "W8A8"}, "device": "cpu"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    assert synthquant("run", tmp_path / "recipe.yaml", "--out", out).status == 0
    before = hashes(out / "images") | hashes(out / "model")
    (out / "images" / "part-00000.safetensors").unlink()
    (out / "model" / "model.safetensors").unlink()
    outcome = synthquant("run", tmp_path / "recipe.yaml", "--out", out)
    assert outcome.status == 0 and "part-00000.safetensors is missing" in outcome.err
    assert hashes(out / "images") | hashes(out / "model") == before


def test_a_killed_recording_ends_with_the_same_bytes(synthquant: Command, folder: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return recording(folder, tmp_path / name, "sampler_steps=40", "steps=10", count=40)

    kill_when(start(*arguments("killed")), tmp_path / "killed" / "part-00000.safetensors")
    assert not (tmp_path / "killed" / "trajectory.json").exists()
    refused = synthquant("quantize", folder, "--images", tmp_path / "killed", "--out", tmp_path / "run").error
    assert "is an unfinished trajectory; run the command that makes it again" in refused
    for name in ("killed", "whole"):
        assert synthquant(*arguments(name)).status == 0
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")


def test_wrong_input_is_one_line_and_leaves_nothing(synthquant: Command, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    for settings, message in (
        (("prompts=[a cat]",), "prompts are given and"),
        (("sampler_steps=2000",), "2000 steps are more than the 1000 that the scheduler"),
        (("steps=5",), "steps is 5 and the sampler makes 4"),
        (("stpes=5",), "unknown setting 'images.stpes'; did you mean 'images.steps'?"),
        (("height=64",), "give height and width or neither"),
    ):
        assert message in synthquant(*recording(folder, out, *settings)).error
    assert "is no diffusion pipeline, whose sampler" in synthquant(*recording("zoo/cifar10-resnet20", out)).error
    assert "diffusers/ names no pipeline" in synthquant(*recording("diffusers/", out)).error
    assert "there is no pipeline folder nix" in synthquant(*recording("diffusers/nix", out)).error
    noise = synthquant("synthesize", folder, "--method", "noise", "--count", "2", "--out", out).error
    assert "takes no images, but inputs sample, timestep" in noise and noise.endswith("what self_sampling records")
    assert not out.parent.exists()
