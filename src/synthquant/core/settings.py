"""Settings: frozen values whose fields, bounds and docstrings are the only source of configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from synthquant.core.errors import RecipeError, did_you_mean


class Settings(BaseModel):
    """Base of everything that is configured: immutable, no unknown fields, each field explained below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


S = TypeVar("S", bound=BaseModel)


def parse_settings(cls: type[S], values: Mapping[str, Any], where: str) -> S:
    """Return `cls(**values)`.

    Raises `RecipeError` in one line that starts with `where` and names each wrong field with its value,
    what is allowed, and for an unknown field the nearest known one.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        problems = [_problem(cls, detail) for detail in error.errors()]
        raise RecipeError(f"{where}: {'; '.join(problems)}") from error


def allowed_range(field: FieldInfo) -> str:
    """Return the bounds of a numeric field as text, for example `>= 1 and <= 8`; empty if it has none."""
    bounds = []
    for rule in field.metadata:
        match rule:
            case Ge(ge=bound):
                bounds.append(f">= {bound}")
            case Gt(gt=bound):
                bounds.append(f"> {bound}")
            case Le(le=bound):
                bounds.append(f"<= {bound}")
            case Lt(lt=bound):
                bounds.append(f"< {bound}")
    return " and ".join(bounds)


def _problem(cls: type[BaseModel], detail: ErrorDetails) -> str:
    parts = [str(part) for part in detail["loc"]]
    path = ".".join(parts) or "settings"
    owner = _owner(cls, parts[:-1])
    names = list(owner.model_fields) if owner else []
    if detail["type"] == "extra_forbidden":
        known = f" known: {', '.join(names)}" if names else ""
        return f"unknown setting {path!r};{did_you_mean(parts[-1], names)}{known}"
    if detail["type"] == "missing":
        return f"setting {path!r} is missing"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[:1].lower() + message[1:]
    field = owner.model_fields.get(parts[-1]) if owner and parts else None
    allowed = allowed_range(field) if field else ""
    shown = repr(detail["input"])
    value = f" = {shown}" if parts and len(shown) <= 80 else ""
    return f"{path}{value}: {message}{f' (allowed: {allowed})' if allowed else ''}"


def _owner(cls: type[BaseModel], parts: list[str]) -> type[BaseModel] | None:
    """Return the settings class that the path leads to, if the path goes through plain fields."""
    owner: type[BaseModel] | None = cls
    for part in parts:
        field = owner.model_fields.get(part) if owner else None
        owner = _settings_in(field.annotation) if field else None
    return owner


def _settings_in(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    for candidate in candidates:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
