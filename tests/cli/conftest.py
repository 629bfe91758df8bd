from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.small_networks import small_float_model, small_images

from synthquant.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command did, as its caller sees it."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line a failed command leaves on standard error."""
        assert self.status != 0
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0]


Command = Callable[..., Outcome]


@pytest.fixture
def synthquant(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def model_options(tmp_path: Path) -> list[str]:
    """A small network of a user's file, with the options it needs."""
    source = small_float_model(tmp_path).source.source
    return [source, "--input-size", "16", "--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Labelled images that fit the network."""
    small_images(21).save(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def recipe(model_options: list[str], data: Path, tmp_path: Path) -> Path:
    """A recipe that takes a second."""
    values: dict[str, Any] = {
        "model": {
            "source": model_options[0],
            "input_size": [16, 16],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
        },
        "images": {"method": "noise", "count": 9},
        "quantize": {"method": "rtn", "scheme": "W4A4"},
        "evaluate": {"data": str(data)},
        "device": "cpu",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"
