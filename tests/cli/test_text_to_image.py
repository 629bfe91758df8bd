"""The text-to-image commands as people type them, and a run that is really killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tests.cli.conftest import Command
from tests.killed import kill_when, start

from synthquant.core.files import sha256_file
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images

NETWORK = "zoo/cifar10-resnet20"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real images of each class."""
    images = open_images("bundled/cifar10-test")
    assert images.labels is not None
    chosen = torch.cat([(images.labels == label).nonzero()[:2, 0] for label in range(10)])
    return images.subset(chosen).save(tmp_path_factory.mktemp("real") / "few").folder or Path()


def drawing(generator_folder: Path, out: Path, *more: str) -> list[str]:
    settings = [f"generator={generator_folder}", "classes=cifar10", "steps=1", "batch_size=4", *more]
    options = [option for setting in settings for option in ("--set", setting)]
    return ["synthesize", NETWORK, "--method", "text_to_image", "--count", "10", "--out", str(out), *options]


def test_draw_tune_and_draw_again(synthquant: Command, generator_folder: Path, few: Path, tmp_path: Path) -> None:
    outcome = synthquant(*drawing(generator_folder, tmp_path / "plain"), "--json")
    assert json.loads(outcome.out)["count"] == 10
    token = tmp_path / "made" / "token.safetensors"
    options = (
        "--images",
        few,
        "--classes",
        "cifar10",
        "--out",
        token,
        "--set",
        "iterations=3",
        "--set",
        "batch_size=2",
    )
    outcome = synthquant("tune-prompt", generator_folder, *options, "--json")
    found = json.loads(outcome.out)
    assert found.pop("environment")["device"] == "cpu"
    read = {"set_aside_count": 0, "set_aside": [], "changed": {}}
    assert found == {"out": str(token), "token": "<real>", "width": 16} | read
    assert "tune prompt: 3/3" in outcome.err
    assert "this token is finished" in synthquant("tune-prompt", generator_folder, *options).err
    synthquant(*drawing(generator_folder, tmp_path / "styled", f"embedding={token}"))
    assert all("<real>" in text for text in ImageSet.open(tmp_path / "styled").column("prompt"))


def test_a_recipe_that_tunes_draws_and_quantizes(
    synthquant: Command, generator_folder: Path, few: Path, tmp_path: Path
) -> None:
    tuning = {"images": str(few), "shots": 2, "iterations": 2, "batch_size": 2}
    images = {"method": "text_to_image", "count": 6, "generator": str(generator_folder), "steps": 1, "tuning": tuning}
    values = {"model": NETWORK, "images": images, "quantize": {"method": "rtn", "scheme": "W8A8"}, "device": "cpu"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "run"
    outcome = synthquant("run", tmp_path / "recipe.yaml", "--out", out, "--set", "images.tuning.shots=1", "--json")
    assert outcome.status == 0 and json.loads(outcome.out)["count"] == 6
    assert (out / "images" / "token.safetensors").is_file()
    assert yaml.safe_load((out / "recipe.yaml").read_text())["images"]["tuning"]["shots"] == 1


def test_a_killed_drawing_ends_with_the_same_bytes(synthquant: Command, generator_folder: Path, tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        return drawing(generator_folder, tmp_path / name, "steps=8")

    def hashes(name: str) -> dict[str, str]:
        return {path.name: sha256_file(path) for path in (tmp_path / name).iterdir()}

    kill_when(start(*arguments("killed")), tmp_path / "killed" / "part-00000.parquet")
    assert not (tmp_path / "killed" / "manifest.json").exists()
    for name in ("killed", "whole"):
        assert synthquant(*arguments(name)).status == 0
    assert hashes("killed") == hashes("whole")


def test_wrong_input_is_one_line_and_leaves_nothing(
    synthquant: Command, generator_folder: Path, few: Path, tmp_path: Path
) -> None:
    out, token = tmp_path / "a" / "out", tmp_path / "b" / "token.safetensors"
    for settings, message in (
        (("generator=none/of/it",), "there is no pipeline folder none/of/it"),
        (("only=[cat, hrose]",), "only: unknown class 'hrose'; did you mean 'horse'?"),
        (("classes=[]",), "classes names no class"),
        (("classes=[a, b]",), "classes names 2 classes but cifar10-resnet20 has 10"),
        (("embedding=none.safetensors",), "embedding none.safetensors does not exist"),
        (("stpes=3",), "unknown setting 'images.stpes'; did you mean 'images.steps'?"),
    ):
        assert message in synthquant(*drawing(generator_folder, out, *settings)).error
    tune = ("tune-prompt", generator_folder, "--out", token)
    for options, message in (
        (("--images", "none/at/all/x", "--classes", "cifar10"), "no images at 'none/at/all/x'"),
        (("--images", few, "--classes", "cifar11"), "classes=cifar11 is no file and not built in"),
        (("--images", few, "--classes", "cifar10", "--set", "shot=2"), "unknown setting 'shot'; did you mean 'shots'?"),
        (("--images", few, "--classes", "cifar10", "--set", "shots=3"), "has 2 real images, shots asks for 3"),
        (("--images", few, "--classes", "model"), "set classes to cifar10, imagenet-1k"),
    ):
        lines = synthquant(*tune, *options).err.splitlines()
        assert message in lines[-1] and lines[-1].startswith("error: ")
    assert "must end in .safetensors" in synthquant(*tune[:3], "x.bin", "--images", few, "--classes", "cifar10").error
    assert not out.parent.exists() and not token.parent.exists()
