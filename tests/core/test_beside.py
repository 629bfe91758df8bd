from __future__ import annotations

from pathlib import Path

import pytest

from synthquant.core.beside import paths_beside


def test_what_lies_beside_the_recipe_is_meant(tmp_path: Path) -> None:
    for name in ("net.py", "w.pt", "my set/manifest.json", "hub/name/config.json", "cifar10/a.png", "words.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    values = {
        "model": {"source": "net.py:build", "weights": "w.pt", "input_size": [8, 8]},
        "images": {"source": "my set"},
        "quantize": {"method": "rtn", "run": "runs/none"},
        "evaluate": {"data": "bundled/cifar10-test"},
        "seed": 3,
    }
    found = paths_beside(values, tmp_path)
    assert found == {
        **values,
        "model": {"source": f"{tmp_path}/net.py:build", "weights": f"{tmp_path}/w.pt", "input_size": [8, 8]},
        "images": {"source": f"{tmp_path}/my set"},
    }
    assert values["images"] == {"source": "my set"}
    drawn = paths_beside(
        {"images": {"method": "text_to_image", "classes": "cifar10", "prompts": "words.txt"}}, tmp_path
    )
    assert drawn["images"] == {"method": "text_to_image", "classes": "cifar10", "prompts": f"{tmp_path}/words.txt"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("transformers/hub/name", "transformers/{}/hub/name"),
        ("transformers/hub/other", "transformers/hub/other"),
        ("timm/resnet18", "timm/resnet18"),
        ("other.py:build", "other.py:build"),
        ("{}/net.py:build", "{}/net.py:build"),
        ("a\0b", "a\0b"),
    ],
)
def test_names_that_are_no_paths_stay(name: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "hub/name").mkdir(parents=True)
    (tmp_path / "net.py").write_text("")
    model = paths_beside({"model": {"source": name.format(tmp_path)}}, tmp_path)["model"]
    assert model == {"source": found.format(tmp_path)}
