from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_cifar_classifier as script
from synthquant.models.open import open_model
from synthquant.models.zoo import NETWORKS

ARGUMENTS = ("--epochs", 2, "--batch-size", 2, "--save-seconds", 0)


@pytest.mark.parametrize("model", ["cifar10-resnet20", "cifar10-vit"])
def test_resumed_training_gives_the_same_weights_and_a_card(
    run_script: Callable[..., None], images: Path, tmp_path: Path, model: str
) -> None:
    files = ("--train", images, "--test", images, "--model", model, "--half", "first", "--limit", 8)
    run_script(script, *files, *ARGUMENTS, "--out", tmp_path / "whole")
    for call in range(2):
        assert not list((tmp_path / "parts").glob("*.json")), call
        run_script(script, *files, *ARGUMENTS, "--out", tmp_path / "parts", "--minutes", 0)
    whole, parts = (load_file(tmp_path / name / f"{model}-half.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    card = json.loads((tmp_path / "parts" / f"{model}-half.json").read_text())
    assert card["steps"] == 4 and card["epochs"] == 2 and "--half first" in card["retrain"]
    assert card["data"].startswith("the first half of the training images (4)")
    assert card["top1_images"].startswith("8 test images") and 0 <= card["top1"] <= 1


def test_shipped_weights_open_in_the_zoo(run_script: Callable[..., None], images: Path, tmp_path: Path) -> None:
    run_script(script, "--train", images, "--test", images, "--limit", 8, *ARGUMENTS, "--out", tmp_path)
    model = open_model("zoo/cifar10-resnet20", weights=tmp_path / "cifar10-resnet20.safetensors")
    network = NETWORKS["cifar10-resnet20"].build(10)
    network.load_state_dict(load_file(tmp_path / "cifar10-resnet20.safetensors"))
    inputs = model.example_images()
    torch.testing.assert_close(model.logits(inputs), network.eval()(inputs).detach())


def test_every_network_of_the_zoo_can_be_trained() -> None:
    assert {name.removesuffix("-half") for name in NETWORKS} == set(script.SETTINGS)


def test_both_labels_of_a_mixed_batch_count(images: Path) -> None:
    torch.manual_seed(0)
    settings = script.SETTINGS["cifar10-vit"]
    inputs, labels = script.load(images, limit=8)
    trainer = script.ClassifierTrainer(
        NETWORKS["cifar10-vit"].build(10), settings, inputs, labels, torch.device("cpu"), False
    )
    confident = torch.full((4, 10), -20.0)
    confident[:, 3] = 20.0
    smooth = trainer._loss(confident, torch.full((4,), 3))
    assert smooth.item() == pytest.approx(0.1 * 40 * 0.9, rel=1e-3)


def test_too_few_images_are_refused(run_script: Callable[..., None], images: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="4 images do not fill a batch of 8; give --batch-size"):
        run_script(
            script, "--train", images, "--test", images, "--limit", 4, "--batch-size", 8, "--out", tmp_path / "out"
        )


def test_a_teacher_and_a_start_are_used_and_named_in_the_card(
    run_script: Callable[..., None], images: Path, tmp_path: Path
) -> None:
    files = ("--train", images, "--test", images, "--limit", 8, *ARGUMENTS)
    options = {
        "plain": (),
        "taught": ("--teacher", "cifar10-resnet20-half"),
        "started": ("--lr", 1e-4, "--start", "cifar10-resnet20", "--augmentation", "medium"),
    }
    for name, given in options.items():
        run_script(script, *files, *given, "--out", tmp_path / name)
    weights = {name: load_file(tmp_path / name / "cifar10-resnet20.safetensors")["conv1.weight"] for name in options}
    cards = {name: json.loads((tmp_path / name / "cifar10-resnet20.json").read_text()) for name in options}
    assert not torch.equal(weights["plain"], weights["taught"])
    bundled = load_file(NETWORKS["cifar10-resnet20"].weights)["conv1.weight"].float()
    torch.testing.assert_close(weights["started"].float(), bundled, rtol=0, atol=0.01)
    assert cards["taught"]["teacher"].startswith("zoo/cifar10-resnet20-half, temperature 2.0")
    assert "teacher" not in cards["plain"] and cards["plain"]["start"] == "random weights"
    assert "--augmentation medium --start cifar10-resnet20 " in cards["started"]["retrain"]


def test_the_divergence_from_the_teacher_is_that_of_its_definition(images: Path) -> None:
    torch.manual_seed(0)
    inputs, labels = script.load(images, limit=8)
    teacher = script.bundled("cifar10-resnet20")
    settings = script.SETTINGS["cifar10-resnet20"]
    trainer = script.ClassifierTrainer(
        NETWORKS["cifar10-resnet20"].build(10), settings, inputs, labels, torch.device("cpu"), False, teacher
    )
    x, logits = torch.randn(4, 3, 32, 32), torch.randn(4, 10)
    with torch.no_grad():
        target, found = (teacher(x) / 2).softmax(1), (logits / 2).softmax(1)
    expected = 4 * (target * (target / found).log()).sum(1).mean()
    torch.testing.assert_close(trainer._divergence(logits, x), expected)


def test_images_held_out_are_not_trained_on_and_compare_with_the_start(
    run_script: Callable[..., None], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    build = script.ClassifierTrainer.__init__
    monkeypatch.setattr(
        script.ClassifierTrainer, "__init__", lambda self, *a, **k: (seen.append(len(a[3])), build(self, *a, **k))[1]
    )
    run_script(
        script, "--train", images, "--test", images, "--limit", 8, *ARGUMENTS, "--start", "cifar10-resnet20",
        "--hold-out", 4, "--average", 0.9, "--out", tmp_path,
    )  # fmt: skip
    card = json.loads((tmp_path / "cifar10-resnet20.json").read_text())
    assert seen == [4] and card["steps"] == 4
    inputs, labels = script.load(images, limit=8)
    expected = script.accuracy(script.bundled("cifar10-resnet20"), inputs[4:], labels[4:], torch.device("cpu"))
    assert card["held_out"]["images"] == 4 and card["held_out"]["top1_of_start"] == expected
    assert "--hold-out 4 --average 0.9" in card["retrain"] and "average" in card


def test_the_average_is_what_is_shipped(run_script: Callable[..., None], images: Path, tmp_path: Path) -> None:
    files = ("--train", images, "--test", images, "--limit", 8, *ARGUMENTS)
    for name, given in {"last": (), "averaged": ("--average", 0.999)}.items():
        run_script(script, *files, *given, "--out", tmp_path / name)
    last, averaged = (load_file(tmp_path / name / "cifar10-resnet20.safetensors") for name in ("last", "averaged"))
    assert not torch.equal(last["conv1.weight"], averaged["conv1.weight"])
    assert torch.equal(last["bn1.running_mean"], averaged["bn1.running_mean"])
