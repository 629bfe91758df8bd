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
    module, example = call_user_function(f"{file}:make")
    assert example is None
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


FORMS = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())

def compiled():
    return nn.Sequential(torch.compile(net()), nn.Identity())

def script():
    return nn.Sequential(torch.jit.script(net()))

def exported():
    return torch.export.export(net(), (torch.zeros(2, 3, 4, 4),)).module()

def lazy():
    return nn.LazyLinear(3)
"""


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_parts_are_unwrapped_and_what_is_no_network_of_modules_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "forms.py"
    file.write_text(FORMS, encoding="utf-8")
    found, _ = call_user_function(f"{file}:compiled")
    assert [type(part).__name__ for part in found.modules()] == [
        "Sequential",
        "Sequential",
        "Conv2d",
        "Flatten",
        "Identity",
    ]
    for name, kind in (("script", "a TorchScript module"), ("exported", "exported program"), ("lazy", "lazy layers")):
        with pytest.raises(ModelError, match=rf"forms\.py:{name} returned .*{kind}"):
            call_user_function(f"{file}:{name}")
