"""Which version of the package this is; nothing but the standard library is loaded here."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "synthquant"
"""Name of the package as it is installed."""


def package_version() -> str:
    """Return the installed version of synthquant, or `unknown` when it runs from a bare source tree."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
