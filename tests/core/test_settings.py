from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from synthquant.core.errors import RecipeError
from synthquant.core.settings import LARGEST_INT, Settings, allowed_range, parse_settings


class _Loss(Settings):
    power: float = Field(2.4, gt=0, le=10)
    """Exponent."""


class _Method(Settings):
    iterations: int = Field(500, ge=1, le=1000)
    """Steps."""
    kind: Literal["mse", "lp"] = "mse"
    """Loss."""
    loss: _Loss = _Loss()
    """Loss settings."""
    rate: float | None = Field(None, lt=1)
    """Learning rate."""
    even: int = 2
    """An even number."""

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value


def test_good_values_pass_and_docstrings_are_kept() -> None:
    method = parse_settings(_Method, {"iterations": "7", "loss": {"power": 2}}, "quantize")
    assert (method.iterations, method.loss.power) == (7, 2.0)
    assert _Method.model_fields["iterations"].description == "Steps."


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"iteration": 3},
            "quantize: unknown setting 'iteration'; did you mean 'iterations'? known: iterations, kind,",
        ),
        ({"loss": {"pover": 3}}, "quantize: unknown setting 'loss.pover'; did you mean 'power'? known: power"),
        (
            {"iterations": 0},
            "quantize: iterations = 0: input should be greater than or equal to 1 (allowed: >= 1 and <= 1000)",
        ),
        ({"iterations": "x"}, "quantize: iterations = 'x': input should be a valid integer"),
        ({"loss": {"power": 11}}, "(allowed: > 0 and <= 10)"),
        ({"loss": 3}, "quantize: loss = 3: input should be a valid dictionary"),
        ({"kind": "l1"}, "quantize: kind = 'l1': input should be 'mse' or 'lp'"),
        ({"rate": float("nan")}, "quantize: rate = nan: input should be a finite number"),
        ({"even": 3}, "quantize: even = 3: must be even"),
        ({"iterations": 0, "kind": "l1"}, "; kind = 'l1'"),
    ],
)
def test_bad_values_are_explained_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_settings(_Method, values, "quantize")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_field_is_named() -> None:
    class Needs(Settings):
        count: int
        """How many."""

    with pytest.raises(RecipeError, match="synthesize: setting 'count' is missing"):
        parse_settings(Needs, {}, "synthesize")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _Method().iterations = 3  # type: ignore[misc]  # the point of the test


def test_allowed_range() -> None:
    assert allowed_range(_Method.model_fields["rate"]) == "< 1"
    assert allowed_range(_Method.model_fields["kind"]) == ""


class _Wide(Settings):
    count: int = 1
    """A number."""
    rate: float = 1.0
    """A share."""
    name: str = "x"
    """A text."""
    names: tuple[str, ...] = ()
    """Texts."""
    flag: bool = False
    """Whether."""
    loose: dict[str, Any] = Field(default_factory=dict)
    """Anything."""
    inner: _Loss = _Loss()
    """Settings."""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": True}, "count = True: a number or a text is wanted here, not true or false"),
        ({"rate": False}, "rate = False: a number or a text is wanted here"),
        ({"names": [True]}, "a number or a text is wanted here"),
        ({"count": LARGEST_INT + 1}, "the number is too large"),
        ({"count": -(10**30)}, "the number is too large"),
        ({"rate": 1e300}, "rate = 1e+300: the number is too large"),
        ({"name": "a\0b"}, "the text has a NUL character in it"),
        ({"names": ["a", "\udcff"]}, "the text is not UTF-8"),
        ({"loose": {"a": [{"b": "\0"}]}}, "the text has a NUL character in it"),
        ({"inner": {"power": True}}, "inner.power = True: a number or a text is wanted here"),
    ],
)
def test_values_that_networks_and_files_cannot_hold(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_settings(_Wide, values, "here")


def test_values_at_the_border_are_taken() -> None:
    wide = parse_settings(_Wide, {"count": LARGEST_INT, "rate": 3e38, "flag": True, "loose": {"a": False}}, "here")
    assert (wide.count, wide.rate, wide.flag, wide.loose) == (LARGEST_INT, 3e38, True, {"a": False})


def test_a_former_name_is_told_what_it_is_called_now() -> None:
    class Renamed(Settings):
        renamed: ClassVar[Mapping[str, str]] = {"old": "new"}

        new: int = 1
        """A number."""

    with pytest.raises(RecipeError, match=r"x: setting 'old' is now called 'new'$"):
        parse_settings(Renamed, {"old": 2}, "x")
