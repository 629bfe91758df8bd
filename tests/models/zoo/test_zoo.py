from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch

from synthquant.core.errors import ModelError, UnknownNameError
from synthquant.models import zoo
from synthquant.models.open import open_model
from synthquant.models.zoo import NETWORKS, ZOO, ZooModel, pipelines
from synthquant.models.zoo.mobilenet_cifar import mobilenetv2
from synthquant.models.zoo.resnet_cifar import resnet20
from synthquant.models.zoo.vit_cifar import vit


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
    images = model.example_images()
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


def test_mobilenetv2_is_that_of_the_paper_but_for_width_and_strides() -> None:
    network = mobilenetv2()
    depthwise = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 17 and all(conv.groups == conv.in_channels for conv in depthwise)
    assert sum(parameter.numel() for parameter in network.parameters()) < 2.5e6
    assert sum(isinstance(module, torch.nn.ReLU6) for module in network.modules()) == 1 + 17 + 16 + 1
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert network.features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 4, 4)


def test_vit_is_timms() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    network = vit().eval()
    other = timm.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, mlp_ratio=2, num_classes=10
    ).eval()
    other.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(images), other(images))
    theirs = {name for name, _ in other.named_modules()}
    assert {name for name, _ in network.named_modules()} <= theirs
    assert sum(parameter.numel() for parameter in network.parameters()) < 6e6


def test_only_installed_networks_are_offered() -> None:
    assert "cifar10-resnet20" in ZOO
    assert all(entry.installed and entry.card["name"] == name for name, entry in ZOO.items())
    shipped = {path.stem for path in ZOO.get("cifar10-resnet20").weights.parent.glob("*.safetensors")}
    assert shipped == set(ZOO.names()) <= set(NETWORKS)


def test_a_network_without_its_card_is_not_installed(installed: Installed) -> None:
    entry = NETWORKS["cifar10-resnet20"]
    assert entry.installed and not ZooModel("cifar10-vgg", resnet20).installed
    installed.weights.with_suffix(".json").unlink()
    assert not entry.installed


def test_a_bundled_diffusion_model_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "_FOLDER", tmp_path)
    assert pipelines.installed_pipelines() == ()
    with pytest.raises(UnknownNameError, match=r"unknown bundled diffusion model 'cifar10-ddpm'; available: \(none\)"):
        pipelines.pipeline_folder("cifar10-ddpm")
    folder = tmp_path / "cifar10-ddpm"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    assert pipelines.installed_pipelines() == ("cifar10-ddpm",)
    assert pipelines.pipeline_folder("cifar10-ddpm") == folder


def test_bundled_weights_are_at_most_40_megabytes() -> None:
    package = Path(zoo.__file__).parent
    size = sum(path.stat().st_size for path in package.rglob("*") if path.suffix in (".safetensors", ".json"))
    assert size <= 40e6
    for name in pipelines.installed_pipelines():
        assert json.loads((pipelines.pipeline_folder(name) / "card.json").read_text())["name"] == name
