"""A network from a function in a user's own Python file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.parameter import is_lazy

from synthquant.core.errors import ModelError, did_you_mean
from synthquant.core.modules import replace_module
from synthquant.models.signature import Inputs


def names_code(source: str) -> bool:
    """Whether the name of a model is `FILE.py:FUNCTION`, that is, whether opening it runs code."""
    file, colon, _ = source.rpartition(":")
    return bool(colon) and file.endswith(".py")


def same_code(one: str, other: str) -> bool:
    """Whether two names are of one function in a file of one name, in whatever folder."""
    (file, _, function), (other_file, _, other_function) = one.rpartition(":"), other.rpartition(":")
    return (Path(file).name, function) == (Path(other_file).name, other_function)


def call_user_function(reference: str) -> tuple[nn.Module, Inputs | None]:
    """Call the function that `FILE.py:FUNCTION` names, without arguments, and return its network.

    A network that takes something else than images comes with an example of its inputs: the function then returns both.
    The file may import its neighbours. Raises `ModelError` if there is no such file or function, or if it returns
    something else; what the user's own code raises is passed on.
    """
    with user_code(reference) as function:
        module = function()
    example = None
    if isinstance(module, tuple) and len(module) == 2 and isinstance(module[1], Inputs):
        module, example = module
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{reference} returned a {type(module).__name__}; it must return a torch.nn.Module, or one with an example"
            " of its inputs (synthquant.Inputs)"
        )
    return plain_module(module, reference), example


@contextmanager
def user_code(reference: str, kind: str = "model") -> Iterator[Any]:
    """Give the function, class or metric that `FILE.py:NAME` names; inside, the file's neighbours can be imported.

    Args:
        reference: the name.
        kind: what it is for; a file that is named for two things is run for each.

    Raises:
        ModelError: there is no such file, or nothing in it that has the name and can be called; what the user's own
            code raises is passed on.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ModelError(f"file {path} does not exist; give FILE.py:FUNCTION")
    with _importable(path.resolve().parent):
        code = _execute(path, kind)
        found = getattr(code, name, None)
        if not callable(found) and not hasattr(found, "compute"):
            own = [key for key, value in vars(code).items() if getattr(value, "__module__", None) == code.__name__]
            raise ModelError(
                f"{path} has no function {name!r};{did_you_mean(name, own)} it has: {', '.join(own) or 'none'}"
            )
        yield found


def plain_module(module: nn.Module, reference: str) -> nn.Module:
    """Return the eager network in a module: without what `torch.compile` wraps around it or around parts of it.

    Raises `ModelError` for what has no Python modules to look into: TorchScript, traced, exported and lazy ones.
    """
    while type(module).__name__ == "OptimizedModule":
        module = getattr(module, "_orig_mod")  # noqa: B009  # no attribute of every module
    for name, part in list(module.named_modules()):
        if type(part).__name__ == "OptimizedModule":
            replace_module(module, name, getattr(part, "_orig_mod"))  # noqa: B009
    for part in module.modules():
        kind = _foreign_kind(part)
        if kind is not None:
            raise ModelError(
                f"{reference} returned {kind}, which has no modules whose layers can be quantized; return the"
                " torch.nn.Module that it was made from"
            )
    if any(is_lazy(value) for value in (*module.parameters(), *module.buffers())):
        raise ModelError(
            f"{reference} returned a network with lazy layers, whose weights have no shape yet; run it once on an image"
            " in the function, or give the layers their sizes"
        )
    return module


def _foreign_kind(part: nn.Module) -> str | None:
    """What a module is, if it is not made of Python modules."""
    if isinstance(part, torch.jit.ScriptModule):
        return "a TorchScript module"
    exported = isinstance(part, torch.fx.GraphModule) and hasattr(part, "_guards_fn")
    return "the module of an exported program" if exported else None


def _execute(path: Path, kind: str) -> ModuleType:
    name = f"synthquant_{kind}_{path.stem}"
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
