"""Every command that reads images counts and says what was set aside or changed, in the same words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.cli.conftest import Command

from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.models.zoo import CIFAR10_CLASSES

NETWORK = "zoo/cifar10-resnet20"
WARNING = "warning: 2 images set aside, for example 1/cut.png: damaged or truncated: image file is truncated (in "
CHANGE = "1 image read with a change: transparency dropped, for example 2/clear.png (in "
FOUND = {
    "set_aside_count": 2,
    "set_aside": [
        {"name": "1/cut.png", "reason": "damaged or truncated: image file is truncated"},
        {"name": "3/huge.png", "reason": "too large: 300x300, the limit is 0.05 million pixels"},
    ],
    "changed": {"transparency dropped": 1},
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images of seven classes; one is cut off, one is larger than 50,000 pixels, one is transparent."""
    folder = tmp_path / "photos"
    for label in range(7):
        (folder / str(label)).mkdir(parents=True)
        noise = torch.randint(0, 256, (20, 20, 3), generator=torch.Generator().manual_seed(label), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / str(label) / "a.png")
    (folder / "1/cut.png").write_bytes((folder / "1/a.png").read_bytes()[:300])
    Image.new("RGB", (300, 300)).save(folder / "3/huge.png")
    Image.new("RGBA", (20, 20), (90, 9, 120, 0)).save(folder / "2/clear.png")
    return folder


def said(err: str, source: object) -> None:
    assert err.count(f"{WARNING}{source})\n") == 1, err
    assert err.count(f"{CHANGE}{source})\n") == 1, err


def told(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in FOUND}


def test_what_commands_say_of_the_images_they_read(
    synthquant: Command, model_options: list[str], photos: Path, tmp_path: Path
) -> None:
    limit, run, file = ("--max-pixels", "50000", "--json"), tmp_path / "run", tmp_path / "net.onnx"
    outcome = synthquant("evaluate", *model_options, "--data", photos, *limit)
    said(outcome.err, photos)
    assert told(json.loads(outcome.out)) == FOUND and json.loads(outcome.out)["count"] == 8

    method = ("--method", "rtn", "--scheme", "W8A8", "--set", "scheme.weights.symmetric=true")
    outcome = synthquant("quantize", *model_options, "--images", photos, *method, "--out", run, *limit)
    assert outcome.err.count("warning: 2 images set aside, for example ") == 1  # drawn in another order
    assert outcome.err.count(f"{CHANGE}{photos})\n") == 1
    result = json.loads(outcome.out)
    assert told(result["images"])["set_aside_count"] == told(result)["set_aside_count"] == 2
    assert {row["name"] for row in told(result)["set_aside"]} == {"1/cut.png", "3/huge.png"}

    outcome = synthquant("evaluate", run, "--trust-code", "--data", photos, *limit)
    said(outcome.err, photos)
    assert told(json.loads(outcome.out)) == FOUND

    lenient = ("--set", "max_mean_error=1", "--set", "min_agreement=0")  # the images are noise
    outcome = synthquant("export", run, "--trust-code", "--out", file, "--data", photos, *limit, *lenient)
    said(outcome.err, photos)
    assert told(json.loads(outcome.out)["verification"]) == FOUND

    outcome = synthquant("evaluate", file, "--trust-code", "--data", photos, *limit)
    said(outcome.err, photos)
    assert told(json.loads(outcome.out)) == FOUND

    pool = ("select", photos, "--model", *model_options, "--by", "energy:4", "--out", tmp_path / "kept", *limit)
    outcome = synthquant(*pool)
    said(outcome.err, "the pool")
    assert told(json.loads(outcome.out)) == FOUND
    assert told(json.loads(synthquant(*pool).out)) == FOUND  # read from there


def test_networks_that_guess_and_images_that_show_nothing_are_said(synthquant: Command, tmp_path: Path) -> None:
    data = open_images("bundled/cifar10-test")
    assert data.labels is not None
    chosen = torch.cat([(data.labels == label).nonzero().flatten()[:4] for label in range(10)]).tolist()
    images = torch.stack([data[index].image for index in chosen])
    for name, labels in (("right", data.labels[chosen]), ("wrong", (data.labels[chosen] + 1) % 10)):
        ImageSet.from_tensors(images, labels).save(tmp_path / name)
    assert "guessing" not in synthquant("evaluate", NETWORK, "--data", tmp_path / "right").err
    outcome = synthquant("evaluate", NETWORK, "--data", tmp_path / "wrong")
    doubt = f"warning: the float network's top-1 on {tmp_path / 'wrong'} is 0.00% (95% interval 0.00% to 8.76% of 40"
    assert f"{doubt} images): no better than guessing among 10 classes; check that labels" in outcome.err

    shown = torch.cat([torch.zeros(3, 3, 32, 32), torch.full((2, 3, 32, 32), 200.0)])
    ImageSet.from_tensors(shown, columns={"x": range(5)}).save(tmp_path / "odd")
    made = ("--images", tmp_path / "odd", "--data", tmp_path / "wrong", "--method", "rtn", "--out", tmp_path / "run")
    outcome = synthquant("quantize", NETWORK, *made)
    assert doubt in outcome.err
    start = f"warning: {tmp_path / 'odd'}: "
    assert f"{start}3 of 5 images are black: " in outcome.err
    assert f"{start}2 of 5 images are constant: " in outcome.err
    assert (
        f"{start}2 of 5 images are far outside 0..1 (below -2 or above 3; 0 is black and 1 is white): " in outcome.err
    )
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["stages"]["images"]["metrics"]["suspicious"]["black"] == 3


def test_folders_of_some_classes_get_the_right_labels(synthquant: Command, tmp_path: Path) -> None:
    data = open_images("bundled/cifar10-test")
    assert data.labels is not None
    for label in (9, 3):
        folder = tmp_path / "photos" / CIFAR10_CLASSES[label]
        folder.mkdir(parents=True)
        for index in (data.labels == label).nonzero().flatten()[:6].tolist():
            Image.fromarray(data[index].image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    outcome = synthquant("evaluate", "zoo/cifar10-resnet20", "--data", tmp_path / "photos", "--json")
    assert json.loads(outcome.out)["top1"] > 0.7
    assert f"{tmp_path / 'photos'}: labels by the names of the folders (cat is 3, truck is 9)\n" in outcome.err
