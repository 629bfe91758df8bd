"""YAML of recipes and of values on the command line, as plain data and without its traps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml

from synthquant.core.errors import RecipeError

_DEEPEST = 32
_MOST_VALUES = 100_000
LONGEST = 2**20
"""Characters of the longest text that is read."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, and turns what the constructors let slip through into YAML errors."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        for key, times in keys.items():
            if times > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # !!int x, 2001-99-99, 5,000 digits
            raise yaml.constructor.ConstructorError(None, None, f"{error}", node.start_mark) from error


def parse_yaml(text: str) -> Any:
    """Return the plain data that a YAML text describes.

    Raises `RecipeError`, to be completed by who knows where the text is from, if it is not YAML, names a setting twice,
    or is longer, deeper or, with its references written out, larger than any recipe.
    """
    if len(text) > LONGEST:
        raise RecipeError(f"is longer than {LONGEST} characters")
    try:
        _require_shallow(text)
        value = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise RecipeError(f"is not YAML: {error.problem or error.context}{place}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"is not YAML: {error}") from error
    _require_moderate(value)
    return value


def _require_shallow(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):  # one by one: stops where it is too deep
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise RecipeError(f"is nested deeper than {_DEEPEST} levels")


def _require_moderate(value: Any) -> None:
    # References make a value of many lines appear in many places, or inside itself.
    waiting, seen = [(value, 0)], 0
    while waiting:
        one, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST:
            raise RecipeError(f"is nested deeper than {_DEEPEST} levels")
        if seen > _MOST_VALUES:
            raise RecipeError(f"holds more than {_MOST_VALUES} values with its references written out")
        if isinstance(one, dict):
            waiting += [(inner, depth + 1) for inner in one.values()]
        elif isinstance(one, list | tuple | set):
            waiting += [(inner, depth + 1) for inner in one]
