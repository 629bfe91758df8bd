"""The list of mutations keeps up with the code: each can be made, and in one place."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = tomllib.loads((ROOT / "benchmarks" / "mutations.toml").read_text())


@pytest.mark.parametrize("part", PARTS)
def test_every_mutation_can_be_made(part: str) -> None:
    lost = []
    for mutation in PARTS[part]["mutation"]:
        path = ROOT / "src" / "synthquant" / mutation["file"]
        if not path.is_file() or path.read_text().count(mutation["old"]) != 1:
            lost.append(f"{mutation['file']}: {mutation['name']}")
    assert not lost
    assert all((ROOT / name).exists() for name in PARTS[part]["tests"])
