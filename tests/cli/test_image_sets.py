"""What somebody does with an image set: look at it, hand it to others, quantize with it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.cli.conftest import Command

from synthquant.core.errors import DataError
from synthquant.data.image_folder import write_image_folder
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images


def beyond(folder: Path) -> Path:
    """Four images of which a quarter of the values lies beyond black and white."""
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:, :, 0], images[:, :, 1] = -0.5, 1.25
    ImageSet.from_tensors(images, torch.tensor([1, 0, 1, 1]), method="noise", seed=3).save(folder)
    return folder


def test_a_set_becomes_pictures_in_class_folders_and_back(synthquant: Command, tmp_path: Path) -> None:
    source = beyond(tmp_path / "set")
    said = synthquant("export-images", source, "--out", tmp_path / "pictures").out.splitlines()
    assert said[0] == f"4 images in {tmp_path / 'pictures'}"
    assert said[1].startswith("25.0% of values beyond black and white (-0.50 to 1.25)")
    assert {path.relative_to(tmp_path / "pictures").as_posix() for path in (tmp_path / "pictures").rglob("*.png")} == {
        *("1/00000000.png", "0/00000001.png", "1/00000002.png", "1/00000003.png")
    }
    back = open_images(tmp_path / "pictures")
    stored = ImageSet.open(source)[1].image
    read = next(back[place].image for place in range(4) if back[place].label == 0)
    assert torch.equal(read, stored.float().clamp(0, 1).mul(255).round().byte())
    assert (
        "already exists and is not empty" in synthquant("export-images", source, "--out", tmp_path / "pictures").error
    )


def test_pictures_without_labels_of_one_channel_and_of_odd_class_names(tmp_path: Path) -> None:
    grey = ImageSet.from_tensors(torch.full((1, 1, 4, 4), 0.5))
    assert write_image_folder(grey, tmp_path / "grey") == 1
    assert Image.open(tmp_path / "grey" / "00000000.png").mode == "L"
    named = ImageSet.from_tensors(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))
    named.manifest = named.manifest.model_copy(update={"class_names": ("../cat", "a/b")})
    write_image_folder(named, tmp_path / "named")
    assert sorted(path.name for path in (tmp_path / "named").iterdir()) == ["_cat", "a_b"]
    with pytest.raises(DataError, match="a PNG has 1 or 3 channels, these images have 4"):
        write_image_folder(ImageSet.from_tensors(torch.rand(1, 4, 4, 4)), tmp_path / "four")
    assert not (tmp_path / "four").exists()


def test_a_report_shows_an_image_set(synthquant: Command, tmp_path: Path) -> None:
    source, page = beyond(tmp_path / "set"), tmp_path / "page.html"
    assert synthquant("report", source, "--out", page).out.strip() == str(page)
    text = page.read_text()
    assert "<h1>set</h1>" in text and "4 images by noise, seed 3" in text and "25.0% of values" in text
    assert text.count("<img ") == 4
    assert "one image set alone" in synthquant("report", source, source, "--out", page).error


def test_synthesize_and_select_say_what_comes_next(
    synthquant: Command, model_options: list[str], data: Path, tmp_path: Path
) -> None:
    made = synthquant("synthesize", *model_options, "--method", "noise", "--count", 4, "--out", tmp_path / "made").out
    assert "of values beyond black and white" in made
    following = made.splitlines()[-1]
    assert following.startswith("next: synthquant quantize ") and "--out RUN" in following
    words = shlex.split(following)[2:]
    words[words.index("RUN")] = str(tmp_path / "run")
    assert synthquant(*words, "--method", "rtn").status == 0
    select = ["select", data, "--model", *model_options, "--by", "energy:0.5", "--out", tmp_path / "chosen"]
    chosen = synthquant(*select).out.splitlines()[-1]
    assert f"--images {tmp_path / 'chosen'} --input-size 16" in chosen
    assert json.loads(synthquant(*select, "--json").out)["count"] > 0
