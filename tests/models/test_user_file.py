from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from synthquant.core.errors import ModelError
from synthquant.models.user_file import call_user_function

SOURCE = """
from torch import nn
from neighbour import WIDTH

def make():
    return nn.Linear(WIDTH, 2)

def number():
    return 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WIDTH = 5\n", encoding="utf-8")
    path = tmp_path / "network.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_the_function_is_called_and_may_use_neighbouring_files(file: Path) -> None:
    before = list(sys.path)
    module = call_user_function(f"{file}:make")
    assert isinstance(module, nn.Linear)
    assert module.in_features == 5
    assert sys.path == before


def test_mistakes_are_named(file: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.py does not exist; give FILE\.py:FUNCTION"):
        call_user_function(f"{file.parent / 'nothing.py'}:make")
    with pytest.raises(ModelError, match=r"has no function 'mak'; did you mean 'make'\? it has: make, number$"):
        call_user_function(f"{file}:mak")
    with pytest.raises(ModelError, match=r"network\.py:number returned a int; it must return a torch\.nn\.Module"):
        call_user_function(f"{file}:number")
