"""Classes derived at run time, so that a module keeps its place, its attributes and its own forward."""

from __future__ import annotations

from torch import nn

_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def derived_class(addition: type[nn.Module], kind: type[nn.Module], prefix: str = "Quant") -> type[nn.Module]:
    """The class `kind` with what `addition` adds, named after it; one class for each pair."""
    pair = (addition, kind)
    if pair not in _classes:
        _classes[pair] = type(f"{prefix}{kind.__name__}", pair, {"__module__": kind.__module__})
    return _classes[pair]
