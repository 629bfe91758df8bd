"""In what two sets of settings differ, the most telling first, short enough for one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 3
_LONGEST = 60


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differences(there: Mapping[str, Any], now: Mapping[str, Any], *, first: Sequence[str] = ()) -> str:
    """Say in what two flat mappings differ; nothing if they do not.

    At most three names are told with their values, and how many more differ.

    Args:
        there: what is found.
        now: what is asked for.
        first: the names, or sections before a dot, that are told before all others, the most telling first.
    """
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    names.sort(key=lambda name: _rank(name, first))
    told = [f"{name} is {_shown(there.get(name))} there, {_shown(now.get(name))} now" for name in names[:_SHOWN]]
    more = len(names) - len(told)
    return "; ".join([*told, *([f"and {more} more"] if more else [])])


def _rank(name: str, first: Sequence[str]) -> int:
    for rank, start in enumerate(first):
        if name == start or name.startswith(f"{start}."):
            return rank
    return len(first)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
