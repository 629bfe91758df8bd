"""Packages that are called like the verbs they are named after, and methods whose work is done above their own room.

`synthquant.quantize` is a package and, called, the function `quantize` of `synthquant.verbs`. A network's `save` and
`export` are there as well. Both are looked up when they are called: that room knows all others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

HOME = "synthquant.verbs"
"""Where the functions are."""


def verb(name: str) -> Callable[..., Any]:
    """Return the function of that name."""
    found: Callable[..., Any] = getattr(import_module(HOME), name)
    return found


class VerbPackage(ModuleType):
    """A package that is called as the verb of its own name: `sys.modules[__name__].__class__ = VerbPackage`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the verb does."""
        return verb(self.__name__.rpartition(".")[2])(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """What the verb takes, for `inspect` and `help`."""
        return inspect.signature(verb(self.__name__.rpartition(".")[2]))
