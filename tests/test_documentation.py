"""Pages that are written from results and code are as these are now."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import synthquant as sq
from synthquant.nn.activation_quantizers import QUANTIZER_KINDS

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
REGISTRIES = (sq.SYNTHESIZERS, sq.SELECTORS, sq.QUANTIZERS, sq.FINE_TUNERS)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def between_marks(page: str) -> dict[str, str]:
    return dict(re.findall(r"<!-- results:(\w+) -->\n(.*?)\n<!-- /results -->", page, re.DOTALL))


def test_the_numbers_of_the_decision_page_are_those_of_the_results(tables: ModuleType) -> None:
    page = (GUIDES / "which-method.md").read_text()
    found = tables.decisions()
    assert between_marks(page) == found and len(found) == 3
    assert not re.search(r"\d+\.\d", re.sub(r"<!-- results.*?/results -->", "", page, flags=re.DOTALL)), (
        "written by hand"
    )
    # the mean over seeds of one cell, from the file
    rows = tables.read(ROOT / "results" / "zero_shot" / "cifar10-resnet20--noise.json")
    accuracies = [row["top1"] for row in rows["rows"] if (row["scheme"], row["method"]) == ("W4A4", "genie_m")]
    lost = 100 * (sum(accuracies) / len(accuracies) - rows["float"]["top1"])
    assert f"| `noise` | \u2212{-lost:.1f} |" in page


def test_methods_and_kinds_that_guides_name_are_there() -> None:
    known = {name for registry in REGISTRIES for name in registry.names()}
    page = (GUIDES / "which-method.md").read_text()
    first = {text.partition(" |")[0] for text in re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)}
    assert first and first <= known
    glossary = (GUIDES / "glossary.md").read_text()
    assert {name for name in QUANTIZER_KINDS.names() if f"`{name}`" not in glossary} == set()
    words = ("Unit", "SQNR", "Swing", "Ends", "Observer", "Shortcuts", "KL", "Agreement", "Placement", "Target")
    assert [word for word in (*words, "Held out") if f"**{word}**" not in glossary] == []
