"""Numbers as terminal, reports and tables of the documentation print them; a missing value is an en dash."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

MISSING = "\u2013"
# What XML and UTF-8 cannot hold, and file names and JSON can: control characters and half of a pair of surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """Return `text` with a replacement character for each one that a page cannot hold."""
    return _UNPRINTABLE.sub("\ufffd", text)


def percent(share: float | None, digits: int = 2) -> str:
    """Return a share 0..1 in percent, without the sign: `0.9123` is `91.23`."""
    return MISSING if share is None else f"{100 * share:.{digits}f}"


def signed_percent(share: float) -> str:
    """Return a difference of shares in percent with its sign: `-0.0041` is `\u22120.41`."""
    return f"{100 * share:+.2f}".replace("-", "\u2212")


def number(value: float | None, digits: int = 2) -> str:
    """Return `value` with a fixed number of decimals."""
    return MISSING if value is None else f"{value:.{digits}f}"


def significant(value: float | None, digits: int = 3) -> str:
    """Return `value` with a fixed number of significant digits, small and large ones as powers of ten."""
    return MISSING if value is None else f"{value:#.{digits}g}".removesuffix(".")


def interval(low: float, high: float, form: Callable[[float], str] = percent) -> str:
    """Return two ends, each as `form` writes it: `87.18 to 89.00`."""
    return f"{form(low)} to {form(high)}"


def count(value: int | None) -> str:
    """Return an integer with spaces between thousands."""
    return MISSING if value is None else f"{value:,}".replace(",", " ")


def size(value: float | None) -> str:
    """Return bytes with a binary unit and three digits: `1 090 000` is `1.04 MiB`."""
    return _scaled(value, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def quantity(value: float | None) -> str:
    """Return a large count with a metric prefix: `41e6` is `41.0 M`."""
    return _scaled(value, ("", "k", "M", "G", "T", "P", "E"), 1000)


def duration(seconds: float | None) -> str:
    """Return seconds as `0.42 s`, `4.2 s`, `12.3 s`, `4 min 05 s` or `2 h 10 min`."""
    if seconds is None:
        return MISSING
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {round(seconds) % 60:02d} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60:02d} min"


class Column(NamedTuple):
    """How a quantity stands in a table."""

    heading: str
    """What it is, with its unit."""
    form: Callable[[Any], str]
    """How a value of it is written, without the unit."""


ACCURACY_COLUMNS = {
    "top1": Column("top-1 %", percent),
    "interval": Column("95% interval", lambda ends: interval(*ends)),
    "top5": Column("top-5 %", percent),
    "recovery": Column("recovery %", percent),
    "agreement": Column("agreement %", percent),
    "kl": Column("KL [nats]", significant),
    "sqnr": Column("SQNR [dB]", lambda ratio: number(ratio, 1)),
    "size_bytes": Column("size", size),
    "bit_operations": Column("bit operations", quantity),
    "seconds": Column("measured in", duration),
}
"""Of a row of the accuracy table, in this order."""


def _scaled(value: float | None, units: tuple[str, ...], base: int) -> str:
    if value is None:
        return MISSING
    scaled, index = float(value), 0
    while scaled >= 999.5 and index < len(units) - 1:
        scaled, index = scaled / base, index + 1
    if index == 0:
        return f"{scaled:.0f} {units[0]}".strip()
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f} {units[index]}"
