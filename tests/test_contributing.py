"""The small methods of CONTRIBUTING.md do what is said of them, and the map of the package is true."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.small_networks import small_float_model, small_images

from synthquant import pipeline
from synthquant.core.errors import VerificationError
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import load_checkpoint
from synthquant.export.write import export_run
from synthquant.methods import EXPORTERS, QUANTIZERS, SELECTORS, SYNTHESIZERS
from synthquant.nn.activation_quantizers import QUANTIZER_KINDS
from synthquant.recipe import Recipe

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "synthquant"
_SPEC = importlib.util.spec_from_file_location("architecture", ROOT / "benchmarks" / "architecture.py")
assert _SPEC is not None and _SPEC.loader is not None
architecture = sys.modules["architecture"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(architecture)
EXAMPLES = {
    "planes": SYNTHESIZERS,
    "margin": SELECTORS,
    "shifts": QUANTIZER_KINDS,
    "widest": QUANTIZERS,
    "numpy": EXPORTERS,
}


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The code of the page, run as it stands there and registered for a test only."""
    for registry in EXAMPLES.values():
        registry.names()  # the package's own first
        monkeypatch.setattr(registry, "_own", dict(registry._own))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    assert len(blocks) == len(EXAMPLES)
    found: dict[str, Any] = {"__name__": "contributing"}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), found)
    yield found


def test_the_examples_are_a_run_together(examples: dict[str, Any], tmp_path: Path) -> None:
    assert all(name in registry for name, registry in EXAMPLES.items())
    small_images(21).save(tmp_path / "data")
    recipe = Recipe.parse(
        {
            "model": small_float_model(tmp_path).source.model_dump(mode="json"),
            "images": {"method": "planes", "count": 9, "batch_size": 4},
            "select": ["margin:6"],
            "quantize": {
                "method": "widest",
                "scheme": {"preset": "W8A8", "input_activations": {"kind": "shifts"}},
                "calibration_images": 5,
            },
            "evaluate": {"data": str(tmp_path / "data"), "batch_size": 8},
            "device": "cpu",
        }
    )
    record = pipeline.run(recipe, tmp_path / "run")
    pool = torch.stack([item.image for item in ImageSet.open(tmp_path / "run" / "images")]).float()
    assert len(pool) == 9 and bool((pool == pool[:, :, :1, :1]).all()), "one colour each"
    kept = ImageSet.open(tmp_path / "run" / "selected")
    assert len(kept) == 6 and record.stages["select"].metrics["rejected"] == 3
    model = load_checkpoint(tmp_path / "run" / "model", trust_code=True)
    for quantizer in model.quantizers.values():
        scale = quantizer(torch.tensor([1e-9, 1e9])).max() / (2**7 - 1)
        assert torch.equal(scale.log2(), scale.log2().round()), "a power of two"
    assert record.stages["evaluate"].metrics["accuracy"][1]["agreement"] > 0.8
    out = tmp_path / "net.npz"
    found = export_run(tmp_path / "run", examples["Numpy"](), out, trust_code=True)
    assert found["verification"]["tensors"] == len(model.state()) == len(np.load(out).files)
    state = {name: tensor.numpy() for name, tensor in model.state().items()}
    np.savez(out, **state | {name: value + 1 for name, value in state.items() if name == "fc.weight_codes"})
    with pytest.raises(VerificationError, match=r"fc\.weight_codes was not written"):
        examples["Numpy"]().verify(model, out, kept)


def test_the_picture_of_the_rooms_is_the_contract() -> None:
    assert architecture.PICTURE.read_text() == architecture.draw(), "run python benchmarks/architecture.py"
    rooms = {room.name for row in architecture.layers() for room in row}
    there = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir() if not path.name.startswith("_")}
    assert rooms == there - {"py"}


def test_every_package_lists_its_files() -> None:
    for init in [PACKAGE / "__init__.py", *PACKAGE.rglob("*/__init__.py")]:
        docstring = ast.get_docstring(ast.parse(init.read_text())) or ""
        listed = re.findall(r"^- `([a-z0-9_]+)/?`: .+\.$", docstring, re.M)
        parts = [path for path in init.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
        assert listed == sorted(path.stem for path in parts if path != init), init


def test_the_map_names_files_that_are_there() -> None:
    named = re.findall(r"`([a-z0-9_/]+(?:\.py|/))`", (ROOT / "docs" / "architecture.md").read_text())
    assert len(named) > 40
    for name in named:
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name
