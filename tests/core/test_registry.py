from __future__ import annotations

import pytest

from synthquant.core.errors import InputError, UnknownNameError
from synthquant.core.registry import Registry


def _table() -> Registry[type]:
    table: Registry[type] = Registry("shape")
    table.register("square")(int)
    table.register("circle")(float)
    return table


def test_entries_come_back_sorted() -> None:
    table = _table()
    assert table.names() == ("circle", "square")
    assert table.items() == (("circle", float), ("square", int))
    assert table.get("square") is int
    assert "circle" in table
    assert "cube" not in table
    assert len(table) == 2


def test_decorator_returns_what_it_decorates() -> None:
    table: Registry[type] = Registry("shape")

    @table.register("line")
    class Line:
        pass

    assert table.get("line") is Line
    assert Line.__name__ == "Line"


def test_clash_is_an_error_and_keeps_the_first() -> None:
    table = _table()
    with pytest.raises(InputError, match=r"shape name 'square' is already taken by .*int.*; choose another"):
        table.register("square")(str)
    assert table.get("square") is int


def test_unknown_name_suggests() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown shape 'sqare'; did you mean 'square'\? available: circle, square"
    ):
        _table().get("sqare")


@pytest.mark.parametrize("name", ["", "Upper", "with space", "_private"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="must be lower-case"):
        _table().register(name)
