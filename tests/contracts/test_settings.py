"""Configuration has one source: the field and its docstring. So every field has one, wherever it is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import pytest

import synthquant
from synthquant.core.settings import Settings
from synthquant.methods import EXPORTERS, FINE_TUNERS, QUANTIZERS, SELECTORS, SYNTHESIZERS

METHODS = {
    f"{registry.kind}: {name}": cls
    for registry in (SYNTHESIZERS, SELECTORS, QUANTIZERS, FINE_TUNERS, EXPORTERS)
    for name, cls in registry.items()
}

PUBLISHED = {
    name: cls
    for registry in (SYNTHESIZERS, SELECTORS, QUANTIZERS, FINE_TUNERS)
    for name, cls in registry.items()
    if name != "rtn"  # rounding to nearest is nobody's
}


def all_settings() -> Iterator[type[Settings]]:
    """Every `Settings` subclass of the package."""
    for module in pkgutil.walk_packages(synthquant.__path__, "synthquant."):
        importlib.import_module(module.name)
    waiting = [Settings]
    while waiting:
        for cls in waiting.pop().__subclasses__():
            waiting.append(cls)
            if cls.__module__.startswith("synthquant."):
                yield cls


@pytest.mark.parametrize("cls", sorted(set(all_settings()), key=lambda cls: f"{cls.__module__}.{cls.__qualname__}"))
def test_every_field_of_every_setting_is_explained(cls: type[Settings]) -> None:
    unexplained = [name for name, field in cls.model_fields.items() if not (field.description or "").strip()]
    assert not unexplained, f"{cls.__qualname__}: write a docstring under {', '.join(unexplained)}"


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_every_method_is_frozen_settings_that_can_be_made_without_arguments(cls: type) -> None:
    assert issubclass(cls, Settings)
    assert cls.model_config["frozen"] and cls.model_config["extra"] == "forbid"
    assert cls() == cls.model_validate(cls().model_dump(mode="json"))


@pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
def test_the_first_line_of_a_method_says_what_it_is(cls: type) -> None:
    first = (inspect.getdoc(cls) or "").partition("\n")[0]
    assert 20 <= len(first) <= 120 and first.endswith(".")


@pytest.mark.parametrize("cls", PUBLISHED.values(), ids=PUBLISHED)
def test_a_method_from_a_paper_names_it(cls: type) -> None:
    assert re.search(r"arXiv:\d{4}\.\d{5}", (inspect.getdoc(cls) or "").partition("\n")[0])
