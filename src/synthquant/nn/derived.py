"""Classes derived at run time, so that a module keeps its place, its attributes and its own forward."""

from __future__ import annotations

from torch import nn

_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def derived_class(addition: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """The class `kind` with what `addition` adds; one class for each pair."""
    pair = (addition, kind)
    if pair not in _classes:
        _classes[pair] = type(f"Quant{kind.__name__}", pair, {"__module__": kind.__module__})
    return _classes[pair]
