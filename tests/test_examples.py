"""The tutorials of examples/ run as they stand, at the smallest size, and their pages hold all of their code."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = {
    "own_network": ["--pictures", "200", "--steps", "3", "--count", "4", "--iterations", "1"],
    "segmentation_to_onnx": ["--steps", "3", "--count", "4", "--iterations", "1"],
    "text_to_image_data": ["--count", "4", "--steps", "1", "--iterations", "1", "--limit", "16"],
}
SAID = {
    "own_network": r"QuantModel\(Sequential, W4A4.*\nfloat: top-1 .* of 40 pictures\nquantized: .*\nagreement .*\n"
    r"loaded network gives the same: True\n",
    "segmentation_to_onnx": r"QuantModel\(UNet, W[78]A8.*\n\d.* dB, \d.* of pixels as in float, mIoU .*\n"
    r"right pixels in the file \d.*%, right pixels in float \d.*%\n",
    "text_to_image_data": r"(\d: .*\n){3}2 of 4 are kept\ndrawn: top-1 .* of 16 pictures\nchosen: top-1 .*\n",
}
NEEDED = {"segmentation_to_onnx": "onnxruntime", "text_to_image_data": "diffusers"}


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SMALL)
def test_a_tutorial_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name]])
    with torch.random.fork_rng():
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert re.fullmatch(SAID[name], capsys.readouterr().out)


@pytest.mark.parametrize("name", SMALL)
def test_its_page_is_its_code_and_what_it_printed(name: str, hooks: ModuleType) -> None:
    assert set(SMALL) == set(hooks.TUTORIALS)
    text = (ROOT / "examples" / f"{name}.py").read_text()
    page = hooks.tutorial(name)
    body = text.split('"""\n', 1)[1]
    shown = [line for line in page.splitlines() if line and not line.startswith("```")]
    for line in body.splitlines():
        assert not line or line in shown or line.removeprefix("# ") in shown, line
    assert page.startswith("# ") and page.count("```python") > 4
    assert "# Here" not in page and "\n# First" not in page, "comments are prose"
    printed = json.loads((ROOT / "results" / "examples" / f"{name}.json").read_text())["printed"]
    said = re.sub(r"of (16|40) pictures", r"of \\d+ pictures", SAID[name]).replace("2 of 4", r"\d+ of 64")
    assert printed in page and re.fullmatch(said, printed)
