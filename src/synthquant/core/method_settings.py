"""Sections of plain data that name a method and set its fields, as recipes and the command line have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast

from synthquant.core.errors import RecipeError, did_you_mean
from synthquant.core.registry import Registry
from synthquant.core.settings import Settings, parse_settings

M = TypeVar("M")


def build_method(registry: Registry[type[M]], name: str, values: Mapping[str, Any], where: str) -> M:
    """Return the method registered as `name` with its fields set.

    Raises:
        UnknownNameError: no such method.
        RecipeError: an unknown or bad field.
    """
    method: M = parse_settings(cast(Any, registry.get(name)), values, where)
    return method


def method_settings(method: object) -> dict[str, Any]:
    """Return all fields of a method as plain data."""
    return cast(Settings, method).model_dump(mode="json")


def split_section(
    values: Mapping[str, Any], section: type[Settings], registry: Registry[type[M]], name: str, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide a section into its own fields and the resolved settings of the method it names."""
    if not isinstance(values.get("method"), str):
        raise RecipeError(f"{where}: {name}.method is missing; available: {', '.join(registry.names())}")
    method = values["method"]
    own_names = [field for field in section.model_fields if field != "settings"]
    settings = cast(type[Settings], registry.get(method))
    method_names = list(settings.model_fields)
    for key in values:
        if key in settings.renamed:
            raise RecipeError(f"{where}: setting '{name}.{key}' is now called '{name}.{settings.renamed[key]}'")
        if key not in own_names and key not in method_names:
            known = [f"{name}.{field}" for field in (*own_names, *method_names)]
            path = f"{name}.{key}"
            raise RecipeError(
                f"{where}: unknown setting {path!r};{did_you_mean(path, known)} known for {method}: "
                f"{', '.join((*own_names, *method_names))}"
            )
    own = {key: value for key, value in values.items() if key in own_names}
    fields = {key: value for key, value in values.items() if key not in own_names}
    return own, method_settings(build_method(registry, method, fields, f"{where}: {name}"))


def require_mapping(values: Any, where: str) -> Mapping[str, Any]:
    """Return values that are a mapping with texts as keys; raises `RecipeError` if they are not."""
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{where} must be a mapping of settings, not {type(values).__name__}")
    return values
