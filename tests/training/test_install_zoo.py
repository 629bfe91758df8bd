from __future__ import annotations

import json
from pathlib import Path

import pytest

import install_zoo as script


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """What training and checks leave behind, and an empty zoo."""
    source, results, zoo = (tmp_path / name for name in ("trained", "results", "zoo"))
    (source / "cifar10-ddpm" / "unet").mkdir(parents=True)
    (source / "cifar10-ddpm" / "model_index.json").write_text("{}")
    (source / "cifar10-ddpm" / "card.json").write_text('{"name": "cifar10-ddpm"}')
    (source / "cifar10-ddpm" / "unet" / "weights.safetensors").write_bytes(bytes(100))
    (source / "cifar10-vit.safetensors").write_bytes(bytes(50))
    (source / "cifar10-vit.json").write_text('{"name": "cifar10-vit"}')
    (source / "cifar10-vit.state.pt").write_bytes(bytes(5))
    results.mkdir()
    figures = {"sampling": {"seed": 0}, "empty": {"black": 0}, "fid": {"samples_to_real": 1.5}, "seconds_sampling": 9}
    (results / "cifar10-ddpm.json").write_text(json.dumps(figures))
    (zoo / "weights").mkdir(parents=True)
    return source, results, zoo


def test_networks_are_copied_with_what_they_reached(folders: tuple[Path, Path, Path]) -> None:
    zoo = folders[2]
    for _ in range(2):
        assert script.install(*folders) == ["cifar10-vit", "cifar10-ddpm"]
    card = json.loads((zoo / "pipelines" / "cifar10-ddpm" / "card.json").read_text())
    assert card["name"] == "cifar10-ddpm" and card["reached"]["fid"] == {"samples_to_real": 1.5}
    assert "seconds_sampling" not in card["reached"]
    found = sorted(str(path.relative_to(zoo)) for path in zoo.rglob("*") if path.is_file())
    assert found == [
        *(f"pipelines/cifar10-ddpm/{name}" for name in ("card.json", "model_index.json", "unet/weights.safetensors")),
        *(f"weights/cifar10-vit.{suffix}" for suffix in ("json", "safetensors")),
    ]


def test_nothing_is_copied_if_something_is_missing(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, results, zoo = folders
    monkeypatch.setattr(script, "BUDGET", 100)
    with pytest.raises(SystemExit, match="more than 0 MB"):
        script.install(*folders)
    monkeypatch.undo()
    (source / "cifar10-vit.json").unlink()
    with pytest.raises(SystemExit, match="no card for cifar10-vit"):
        script.install(*folders)
    (source / "cifar10-vit.safetensors").unlink()
    (results / "cifar10-ddpm.json").unlink()
    with pytest.raises(SystemExit, match=r"cifar10-ddpm\.json is missing: run training/check_generators\.py first"):
        script.install(*folders)
    with pytest.raises(SystemExit, match="nothing to install"):
        script.install(results, results, zoo)
    assert not list(zoo.rglob("*.*"))


def test_a_network_that_is_no_better_on_images_held_out_is_not_taken(folders: tuple[Path, Path, Path]) -> None:
    card = {"name": "cifar10-vit", "held_out": {"images": 2000, "top1": 0.7, "top1_of_start": 0.7}}
    (folders[0] / "cifar10-vit.json").write_text(json.dumps(card))
    with pytest.raises(
        SystemExit, match=r"cifar10-vit is not better .* 2000 images held out: 70\.00%, bundled 70\.00%"
    ):
        script.install(*folders)
    card["held_out"] = {"images": 2000, "top1": 0.71, "top1_of_start": 0.7}
    (folders[0] / "cifar10-vit.json").write_text(json.dumps(card))
    assert "cifar10-vit" in script.install(*folders)
