"""Classes derived at run time, so that a module keeps its place, its attributes and its own forward."""

from __future__ import annotations

import copyreg
from typing import Any, cast

from torch import nn

_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
_ORIGIN = "_derived_from"


def derived_class(addition: type[nn.Module], kind: type[nn.Module], prefix: str = "Quant") -> type[nn.Module]:
    """The class `kind` with what `addition` adds, named after it; one class for each pair.

    No module has it under its name, so its instances are pickled and copied with what it is derived from.
    """
    pair = (addition, kind)
    if pair not in _classes:
        content = {"__module__": kind.__module__, "__reduce_ex__": _reduced, _ORIGIN: (addition, kind, prefix)}
        _classes[pair] = type(f"{prefix}{kind.__name__}", pair, content)
    return _classes[pair]


def _reduced(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """As any object, but for the class."""
    make, args, *rest = cast(tuple[Any, ...], object.__reduce_ex__(self, protocol))
    if make is copyreg.__newobj__:  # type: ignore[attr-defined]
        make, args = _new, (_way(args[0]), *args[1:])
    return (make, args, *rest)


def _way(kind: type[nn.Module]) -> Any:
    """How to come to a class: itself, or what it is derived from."""
    origin = vars(kind).get(_ORIGIN)
    return kind if origin is None else (origin[0], _way(origin[1]), origin[2])


def _class_of(way: Any) -> type[nn.Module]:
    """The inverse of `_way`."""
    return derived_class(way[0], _class_of(way[1]), way[2]) if isinstance(way, tuple) else way


def _new(way: Any, *args: Any) -> nn.Module:
    """An instance that is still empty."""
    kind = _class_of(way)
    return kind.__new__(kind, *args)
