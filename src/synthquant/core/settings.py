"""Settings: frozen values whose fields, bounds and docstrings are the only source of configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from synthquant.core.errors import RecipeError, did_you_mean

LARGEST_INT = 2**63 - 1
"""The largest whole number a setting takes: tensors, files and random generators hold no larger one."""
_LARGEST_FLOAT = 3.4e38


class Settings(BaseModel):
    """Base of everything that is configured: immutable, no unknown fields, each field explained below it.

    Beyond their types, values must be ones that networks and files can hold: numbers within 64 and float32 bits, text
    without NUL that can be written as UTF-8, and `true` only where a field says `bool`.
    """

    renamed: ClassVar[Mapping[str, str]] = {}
    """Former names of fields, with those they have now, for errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        types = list(_types_in(cls.model_fields[str(info.field_name)].annotation))
        if not isinstance(value, Mapping) or not any(_is_settings(one) for one in types):  # those look for themselves
            _require_plain(value, bools=any(one is bool or one is Any for one in types))
        return value


def is_unset(value: object) -> bool:
    """`exclude_if` of a field that is written only where it is set: files without it stay the bytes they were."""
    return value is None or value == {}


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


def text_problem(text: str) -> str | None:
    """Return why a text cannot be a name or a path, or `None`."""
    if "\0" in text:
        return "has a NUL character in it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


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


def _require_plain(value: Any, *, bools: bool) -> None:
    """Raise `ValueError` if something in plain data is of no use anywhere."""
    if isinstance(value, bool):
        if not bools:
            raise ValueError("a number or a text is wanted here, not true or false")
    elif isinstance(value, int | float):
        if abs(value) > (LARGEST_INT if isinstance(value, int) else _LARGEST_FLOAT) and not math.isinf(value):
            raise ValueError("the number is too large")
    elif isinstance(value, str):
        if problem := text_problem(value):
            raise ValueError(f"the text {problem}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _require_plain(inner, bools=bools)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _require_plain(key, bools=bools)
            _require_plain(inner, bools=True)


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _types_in(inner)


def _problem(cls: type[BaseModel], detail: ErrorDetails) -> str:
    parts = [str(part) for part in detail["loc"]]
    path = ".".join(parts) or "settings"
    owner = _owner(cls, parts[:-1])
    names = list(owner.model_fields) if owner else []
    if detail["type"] == "extra_forbidden":
        if owner is not None and issubclass(owner, Settings) and parts[-1] in owner.renamed:
            return f"setting {path!r} is now called {owner.renamed[parts[-1]]!r}"
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
        owner = settings_in(field.annotation) if field else None
    return owner


def settings_in(annotation: Any) -> type[BaseModel] | None:
    """Return the settings class that a field of this type holds, or `None`."""
    return next((one for one in (annotation, *get_args(annotation)) if _is_settings(one)), None)


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
