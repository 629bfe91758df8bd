"""Whatever is wrong: one clear line on standard error, nothing on standard output, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tests.cli.conftest import Command
from tests.small_networks import small_images

from synthquant.data.image_set import ImageSet


def changed(recipe: Path, section: str, **values: object) -> Path:
    """Write the recipe with another section beside it."""
    content = yaml.safe_load(recipe.read_text())
    content[section] = values
    path = recipe.with_name("changed.yaml")
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml", "--out", "{out}"], "cannot read recipe none.yaml: No such file or directory"),
        (["run", "{recipe}", "--out", "{out}", "--set", "model.source=none.py:build"], "file none.py does not exist"),
        (["run", "{recipe}", "--out", "{out}", "--set", "model.weights=none.pt"], "none.pt"),
        (
            ["run", "{recipe}", "--out", "{out}", "--set", "evaluate.data=no/such/folder/x"],
            "no images at 'no/such/folder/x'",
        ),
        (["evaluate", "none.py:build", "--data", "bundled/cifar10-test"], "file none.py does not exist"),
        (["report", "{out}"], "is not a run folder"),
    ],
)
def test_missing_file(synthquant: Command, recipe: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    out = tmp_path / "out"
    outcome = synthquant(*(argument.format(recipe=recipe, out=out) for argument in arguments))
    assert message in outcome.error
    assert not out.exists()


def test_wrong_class_count(synthquant: Command, recipe: Path, model_options: list[str], tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    ImageSet.from_tensors(images, labels=torch.tensor([3, 42])).save(tmp_path / "other")
    outcome = synthquant("run", changed(recipe, "evaluate", data=str(tmp_path / "other")), "--out", tmp_path / "out")
    assert "labels up to 42 but Network has 7 classes" in outcome.error
    assert not (tmp_path / "out").exists()
    outcome = synthquant("evaluate", *model_options, "--data", tmp_path / "other")
    assert "42" in outcome.err.splitlines()[-1] and "7 classes" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_corrupt_checkpoint(synthquant: Command, recipe: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x99" * 64)
    outcome = synthquant("run", recipe, "--out", tmp_path / "out", "--set", f"model.weights={tmp_path / name}")
    assert name in outcome.error
    assert not (tmp_path / "out").exists()


def test_checkpoint_of_another_network(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"stem.weight": torch.zeros(8, 3, 3, 3), "tail.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    outcome = synthquant(
        "run", recipe, "--out", tmp_path / "out", "--set", f"model.weights={tmp_path / 'w.safetensors'}"
    )
    assert "missing" in outcome.error and "unexpected" in outcome.error and "tail.weight" in outcome.error


def test_damaged_run_checkpoint(synthquant: Command, recipe: Path, data: Path, tmp_path: Path) -> None:
    synthquant("run", recipe, "--out", tmp_path / "run")
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"\x99" * 64)
    assert "is damaged" in synthquant("evaluate", tmp_path / "run", "--trust-code", "--data", data).error


def test_only_corrupt_images(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    for label in "01":
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "a.png").write_bytes(b"not an image")
    outcome = synthquant("run", changed(recipe, "images", source=str(tmp_path / "photos")), "--out", tmp_path / "out")
    assert "none of the 2 images to quantize with can be read" in outcome.err.splitlines()[-1]
    assert outcome.status == 1 and not (tmp_path / "out").exists()


def test_images_of_other_channels(synthquant: Command, model_options: list[str], tmp_path: Path) -> None:
    images, out = tmp_path / "four", tmp_path / "out"
    ImageSet.from_tensors(torch.zeros(2, 4, 16, 16, dtype=torch.uint8), labels=torch.tensor([0, 1])).save(images)
    why = "(for example 00000000.npy: it has 4 channels, and the network takes 3)"
    commands = {
        "to quantize with": ["quantize", *model_options, "--images", images, "--method", "rtn", "--out", out],
        "to evaluate on": ["evaluate", *model_options, "--data", images],
        "to select from": ["select", images, "--model", *model_options, "--by", "energy:1", "--out", out],
    }
    for purpose, command in commands.items():
        said = synthquant(*command).err.splitlines()[-1]
        assert said == f"error: none of the 2 images {purpose} can be read {why}"
        assert not out.exists()


def test_unknown_method(synthquant: Command, model_options: list[str], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = synthquant("synthesize", *model_options, "--method", "geni_d", "--out", out)
    assert "unknown synthesis method 'geni_d'; did you mean 'genie_d'?" in outcome.error
    outcome = synthquant("quantize", *model_options, "--images", data, "--method", "genie", "--out", out)
    assert "unknown quantization method 'genie'; did you mean 'genie_m'?" in outcome.error
    assert "unknown method 'genie_x'; did you mean 'genie_" in synthquant("show", "genie_x").error
    assert "unknown kind 'quantise'; did you mean 'quantize'?" in synthquant("list", "quantise").error
    assert not out.exists()


def test_misspelt_setting(synthquant: Command, recipe: Path, model_options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = synthquant("run", recipe, "--out", out, "--set", "quantize.obsever=minmax")
    assert "unknown setting 'quantize.obsever'; did you mean 'quantize.observer'?" in outcome.error
    outcome = synthquant("synthesize", *model_options, "--out", out, "--set", "iterashuns=3")
    assert "unknown setting 'images.iterashuns'; did you mean 'images.iterations'?" in outcome.error
    outcome = synthquant("run", recipe, "--out", out, "--set", "evaluate.batchsize=3")
    assert "did you mean 'batch_size'?" in outcome.error
    assert not out.exists()


def test_no_images(synthquant: Command, recipe: Path, model_options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "count" in synthquant("synthesize", *model_options, "--count", 0, "--out", out).error
    assert "count = 0" in synthquant("run", recipe, "--out", out, "--set", "images.count=0").error
    (tmp_path / "empty").mkdir()
    outcome = synthquant("run", changed(recipe, "images", source=str(tmp_path / "empty")), "--out", out)
    assert str(tmp_path / "empty") in outcome.error
    assert not out.exists()


@pytest.mark.parametrize("scheme", ["W1A4", "W4A1", "W33A8", "W8A33"])
def test_bits_1_and_33(
    synthquant: Command, recipe: Path, model_options: list[str], data: Path, tmp_path: Path, scheme: str
) -> None:
    bits = "33" if "33" in scheme else "1"
    outcome = synthquant("run", recipe, "--out", tmp_path / "out", "--set", f"quantize.scheme={scheme}")
    assert f"cannot have {bits} bits; choose 2 to 8" in outcome.error
    outcome = synthquant("quantize", *model_options, "--images", data, "--scheme", scheme, "--out", tmp_path / "out")
    assert f"cannot have {bits} bits; choose 2 to 8" in outcome.error
    assert not (tmp_path / "out").exists()


def test_genie_d_without_batch_norm(synthquant: Command, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7))\n"
    )
    options = ["--input-size", "16", "--mean", "0,0,0", "--std", "1,1,1", "--out", tmp_path / "a" / "out"]
    outcome = synthquant("synthesize", f"{tmp_path}/plain.py:build", "--method", "genie_d", *options)
    assert "has no batch norm" in outcome.error and "noise" in outcome.error
    assert not (tmp_path / "a").exists()


def test_unwritable_output(
    synthquant: Command, recipe: Path, model_options: list[str], data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "out"
    for arguments in (
        ["run", recipe, "--out", out],
        ["synthesize", *model_options, "--method", "noise", "--count", 2, "--out", out],
        ["quantize", *model_options, "--images", data, "--method", "rtn", "--out", out],
        ["demo", "--out", out],
    ):
        assert f"{tmp_path / 'file'} is a file, not a folder" in synthquant(*arguments).error
    assert (tmp_path / "file").read_text() == "mine"


def test_unwritable_report(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    synthquant("run", recipe, "--out", tmp_path / "run")
    outcome = synthquant("report", tmp_path / "run", "--out", recipe / "page.html")
    assert f"cannot write {recipe / 'page.html'}" in outcome.error


def test_output_folder_that_holds_other_things(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").touch()
    assert "is not empty and not a run folder" in synthquant("run", recipe, "--out", tmp_path / "mine").error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["holiday.jpg"]


def test_run_folder_of_another_recipe(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    synthquant("run", recipe, "--out", tmp_path / "run")
    outcome = synthquant("run", recipe, "--out", tmp_path / "run", "--seed", 1)
    assert "(seed is 0 there, 1 now)" in outcome.error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["run"], "Missing argument 'RECIPE.yaml'"),
        (["run", "x.yaml"], "Missing option '--out'"),
        (["run", "x.yaml", "--out", "y", "--sed", "3"], "No such option: --sed"),
        (["demo", "--seed", "many"], "Invalid value for '--seed'"),
    ],
)
def test_wrong_command_line(synthquant: Command, arguments: list[str], message: str) -> None:
    outcome = synthquant(*arguments)
    assert outcome.status == 2
    assert message in outcome.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-size", "a"], "--input-size 'a': give 1 or 2 numbers"),
        (["--input-size", "0"], "input_size.0 = 0: input should be greater than or equal to 1"),
        (["--mean", "half"], "--mean 'half': give a number for each channel"),
        (["--std", "0,0,0"], "std"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
    ],
)
def test_wrong_model_option(
    synthquant: Command, model_options: list[str], data: Path, options: list[str], message: str
) -> None:
    assert message in synthquant("evaluate", *model_options, "--data", data, *options).error


def test_small_set_is_named_when_more_is_asked_for(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    small_images(3).save(tmp_path / "three")
    path = changed(recipe, "images", source=str(tmp_path / "three"), count=4)
    assert "images.count is 4 but" in synthquant("run", path, "--out", tmp_path / "out").error


def test_a_full_disk_is_one_line(
    synthquant: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("synthquant.cli.run.pipeline.run", full)
    assert synthquant("run", recipe, "--out", tmp_path / "out").error == "error: No space left on device: somewhere"
