"""Changing nested settings by texts such as `quantize.iterations=500`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from synthquant.core.errors import RecipeError
from synthquant.core.plain_yaml import parse_yaml


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Return a copy of `values` changed by texts like `quantize.iterations=500`; the right side is read as YAML.

    Args:
        values: nested mappings.
        overrides: `path=value` texts; later ones win.
        prefix: put before each path, for example `images.`.

    Raises:
        RecipeError: a text without `=`, a value that is not YAML, or a path through something that is not a mapping.
    """
    changed = dict(values)
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            raise RecipeError(
                f"--set {_shortened(text)!r}: write it as FIELD=VALUE, for example --set {prefix}iterations=500"
            )
        try:
            read = parse_yaml(value)
        except RecipeError as error:
            raise RecipeError(f"--set {_shortened(text)!r}: its value {error}") from error
        changed = _with(changed, f"{prefix}{path.strip()}".split("."), read, f"--set {_shortened(text)!r}", "")
    return changed


def _with(values: Any, path: Sequence[str], value: Any, where: str, name: str) -> Any:
    """Return a copy of nested mappings and lists with `value` at `path`; `name` is how we came to `values`."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    inner_name = f"{name}.{key}".lstrip(".")
    if isinstance(values, list):
        if not key.isdecimal() or int(key) >= len(values):
            raise RecipeError(f"{where}: {name} is a list with entries 0 to {len(values) - 1}, not {key!r}")
        position = int(key)
        return [*values[:position], _with(values[position], rest, value, where, inner_name), *values[position + 1 :]]
    if values is not None and not isinstance(values, Mapping):
        raise RecipeError(f"{where}: {name} is {values!r}, it has no fields")
    return {**(values or {}), key: _with((values or {}).get(key), rest, value, where, inner_name)}


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}..."
