from __future__ import annotations

import pickle

import pytest

from synthquant.core import errors
from synthquant.core.errors import (
    DataError,
    InputError,
    MissingExtraError,
    ModelError,
    OutputError,
    SynthquantError,
    UnknownNameError,
    UnsupportedModelError,
)


def test_unknown_name_suggests_and_lists() -> None:
    error = UnknownNameError("method", "geni_d", ("genie_d", "noise"))
    assert str(error) == "unknown method 'geni_d'; did you mean 'genie_d'? available: genie_d, noise"


def test_unknown_name_without_a_near_one_only_lists() -> None:
    assert str(UnknownNameError("method", "xyz", ())) == "unknown method 'xyz'; available: (none)"


def test_missing_extra_says_how_to_install() -> None:
    error = MissingExtraError("timm", "models")
    assert str(error) == "package 'timm' is not installed; install it with: pip install 'synthquant[models]'"
    assert str(MissingExtraError("timm", "models", "to open x")).startswith("to open x: package 'timm'")


def test_messages_are_one_line() -> None:
    assert str(InputError("first\n  second\tthird")) == "first second third"
    assert str(OutputError("a\nb")) == "a b"


@pytest.mark.parametrize(
    ("child", "parents"),
    [
        (UnknownNameError, (InputError, ValueError)),
        (DataError, (InputError,)),
        (UnsupportedModelError, (ModelError, InputError)),
        (OutputError, (SynthquantError, OSError)),
        (MissingExtraError, (SynthquantError, ImportError)),
    ],
)
def test_tree(child: type[Exception], parents: tuple[type[Exception], ...]) -> None:
    assert all(issubclass(child, parent) for parent in parents)


def test_docstring_draws_every_class() -> None:
    classes = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) >= 11
    assert errors.__doc__ is not None
    assert [name for name in classes if name not in errors.__doc__] == []


@pytest.mark.parametrize(
    "error",
    [UnknownNameError("method", "a", ("b",)), MissingExtraError("p", "e", "why"), DataError("x"), OutputError("y")],
)
def test_errors_survive_pickling(error: SynthquantError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
