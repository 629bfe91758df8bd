"""The extras of the package: which optional packages each one brings, and which of them are installed."""

from __future__ import annotations

import re
from importlib import metadata

from synthquant.core.version import DISTRIBUTION

_NAME = re.compile(r"[\w.-]+")
_EXTRA = re.compile(r"extra == ['\"]([\w-]+)['\"]")
_OF_DEVELOPERS = ("dev", "docs", "all")


def extras() -> dict[str, dict[str, str | None]]:
    """Return for each extra its packages with their installed versions, none for those that are missing.

    Empty when the package runs from a bare source tree.
    """
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, dict[str, str | None]] = {}
    for text in required:
        name, extra = _NAME.match(text), _EXTRA.search(text)
        if name is not None and extra is not None and extra[1] not in _OF_DEVELOPERS and name[0] != DISTRIBUTION:
            found.setdefault(extra[1], {})[name[0]] = _installed(name[0])
    return found


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
