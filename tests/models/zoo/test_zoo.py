from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

from synthquant.core.errors import ModelError
from synthquant.models import zoo
from synthquant.models.open import open_model
from synthquant.models.zoo import ZOO
from synthquant.models.zoo.resnet_cifar import resnet20


@dataclass(frozen=True)
class Installed:
    weights: Path
    network: torch.nn.Module


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """A zoo folder with random weights in half precision, as the real ones are shipped."""
    network = resnet20()
    folder = tmp_path / "weights"
    folder.mkdir()
    state = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    safetensors.torch.save_file(state, folder / "cifar10-resnet20.safetensors")
    (folder / "cifar10-resnet20.json").write_text(json.dumps({"top1": 0.9}), encoding="utf-8")
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    return Installed(folder / "cifar10-resnet20.safetensors", network)


def test_bundled_weights_are_loaded(installed: Installed) -> None:
    model = open_model("zoo/cifar10-resnet20")
    expected = installed.network.eval().half().float()
    images = model.example_input()
    torch.testing.assert_close(model.logits(images), expected(images).detach())
    assert ZOO.get("cifar10-resnet20").card == {"top1": 0.9}


def test_missing_files_are_named(installed: Installed) -> None:
    installed.weights.with_suffix(".json").unlink()
    with pytest.raises(ModelError, match="the card of zoo/cifar10-resnet20 is missing"):
        _ = ZOO.get("cifar10-resnet20").card
    installed.weights.unlink()
    with pytest.raises(ModelError, match=r"cifar10-resnet20\.safetensors does not exist"):
        open_model("zoo/cifar10-resnet20")


def test_resnet20_is_the_network_of_the_paper() -> None:
    network = resnet20()
    weights = [
        name for name, parameter in network.named_parameters() if parameter.ndim > 1 and "downsample" not in name
    ]
    assert len(weights) == 20
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(0.27e6, rel=0.02)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
