"""How numbers are printed."""

from __future__ import annotations

import pytest

from synthquant.report import formatting

THIN = "\u202f"


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
    assert formatting.size(value).replace(THIN, " ") == text


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
    assert formatting.duration(value).replace(THIN, " ") == text


def test_numbers() -> None:
    assert formatting.percent(0.91234) == "91.23" and formatting.percent(None) == formatting.MISSING
    assert formatting.count(1234567) == f"1{THIN}234{THIN}567" and formatting.count(None) == formatting.MISSING
    assert formatting.quantity(41e6) == f"41.0{THIN}M" and formatting.quantity(3) == "3"
    assert formatting.signed_percent(-0.0041) == "\u22120.41" and formatting.signed_percent(0.0) == "+0.00"
    assert formatting.number(3.14159) == "3.14" and formatting.significant(0.0001234) == "0.000123"
