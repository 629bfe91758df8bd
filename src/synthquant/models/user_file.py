"""A network from a function in a user's own Python file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from torch import nn

from synthquant.core.errors import ModelError, did_you_mean


def names_code(source: str) -> bool:
    """Whether the name of a model is `FILE.py:FUNCTION`, that is, whether opening it runs code."""
    file, colon, _ = source.rpartition(":")
    return bool(colon) and file.endswith(".py")


def same_code(one: str, other: str) -> bool:
    """Whether two names are of one function in a file of one name, in whatever folder."""
    (file, _, function), (other_file, _, other_function) = one.rpartition(":"), other.rpartition(":")
    return (Path(file).name, function) == (Path(other_file).name, other_function)


def call_user_function(reference: str) -> nn.Module:
    """Call the function that `FILE.py:FUNCTION` names, without arguments, and return its network.

    The file may import its neighbours. Raises `ModelError` if there is no such file or function, or if it returns
    something else; what the user's own code raises is passed on.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"file {path} does not exist; give FILE.py:FUNCTION")
    with _importable(path.resolve().parent):
        code = _execute(path)
        function = getattr(code, name, None)
        if not callable(function):
            own = [key for key, value in vars(code).items() if getattr(value, "__module__", None) == code.__name__]
            raise ModelError(
                f"{path} has no function {name!r};{did_you_mean(name, own)} it has: {', '.join(own) or 'none'}"
            )
        module = function()
    if not isinstance(module, nn.Module):
        raise ModelError(f"{reference} returned a {type(module).__name__}; it must return a torch.nn.Module")
    return module


def _execute(path: Path) -> ModuleType:
    name = f"synthquant_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} is not a Python file")
    code = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a class's module up by its name.
    sys.modules[name] = code
    spec.loader.exec_module(code)
    return code


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
