"""How numbers are printed."""

from __future__ import annotations

import pytest

from synthquant.report import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, formatting.MISSING),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_090_000, "1.09 MB"),
        (99_960_000, "100 MB"),
        (9.996e6, "10.0 MB"),
    ],
)
def test_size(value: float | None, text: str) -> None:
    assert formatting.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, formatting.MISSING),
        (0.4, "0.40 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (245, "4 min 05 s"),
        (7800, "2 h 10 min"),
        (3599.6, "1 h 00 min"),
    ],
)
def test_duration(value: float | None, text: str) -> None:
    assert formatting.duration(value) == text


def test_numbers() -> None:
    assert formatting.percent(0.91234) == "91.23" and formatting.percent(None) == formatting.MISSING
    assert formatting.count(1234567) == "1\u202f234\u202f567" and formatting.count(None) == formatting.MISSING
    assert formatting.quantity(41e6) == "41.0 M" and formatting.quantity(3) == "3"
    assert formatting.number(3.14159) == "3.14" and formatting.significant(0.0001234) == "0.000123"
