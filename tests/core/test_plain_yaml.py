"""YAML without its traps."""

from __future__ import annotations

import itertools

import pytest

from synthquant.core.errors import RecipeError
from synthquant.core.plain_yaml import LONGEST, parse_yaml

_BOMB = "\n".join(["a: &a [x]", *(f"{a}: &{a} [{','.join(['*' + b] * 9)}]" for b, a in itertools.pairwise("abcdefgh"))])


def test_what_recipes_are_made_of_is_read() -> None:
    text = (
        "model: &m {source: zoo/x, input_size: [32, 32]}\nlr: 0.1\nnothing:\nyes: true\nother: {<<: *m, weights: w}\n"
    )
    assert parse_yaml(text) == {
        "model": {"source": "zoo/x", "input_size": [32, 32]},
        "lr": 0.1,
        "nothing": None,
        True: True,
        "other": {"source": "zoo/x", "input_size": [32, 32], "weights": "w"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000 + "]" * 3000, "is nested deeper than 32 levels"),
        ("- " * 3000, "is nested deeper than 32 levels"),
        ("a: &a [*a]", "is nested deeper than 32 levels"),
        (_BOMB, "holds more than 100000 values with its references written out"),
        ("x" * (LONGEST + 1), "is longer than"),
        ("a: 1\nb: 2\na: 3", "is not YAML: 'a' is there twice in line 1"),
        ("a: [1", "is not YAML: expected ',' or ']', but got '<stream end>' in line 1"),
        ("a: " + "1" * 5000, "is not YAML: Exceeds the limit"),
        ("a: 2001-99-99", "is not YAML: month must be in 1..12 in line 1"),
        ("a: !!int x", "is not YAML: invalid literal"),
        ("!!int ''", "is not YAML: string index out of range"),
        ("!!bool x", "is not YAML"),
        ("!!timestamp x", "is not YAML"),
        ("!!python/object/apply:os.getcwd []", "is not YAML: could not determine a constructor"),
        ("{[1]: 2}", "is not YAML: found unhashable key"),
        ("a\n---\nb", "is not YAML: but found another document in line 2"),
        ("\x01", "is not YAML: unacceptable character"),
    ],
    ids=range(17),
)
def test_what_is_not_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith(message)
