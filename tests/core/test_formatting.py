"""How numbers are printed."""

from __future__ import annotations

import pytest

from synthquant.core import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, formatting.MISSING),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1024, "1.00 KiB"),
        (1_090_000, "1.04 MiB"),
        (99.96 * 2**20, "100 MiB"),
        (9.996 * 2**20, "10.0 MiB"),
        (3 * 2**50, "3072 TiB"),
    ],
)
def test_size(value: float | None, text: str) -> None:
    assert formatting.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, formatting.MISSING),
        (0.4, "0.40 s"),
        (0.996, "1.0 s"),
        (4.26, "4.3 s"),
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
    assert formatting.count(1234567) == "1 234 567" and formatting.count(None) == formatting.MISSING
    assert formatting.quantity(41e6) == "41.0 M" and formatting.quantity(3) == "3"
    assert formatting.signed_percent(-0.0041) == "\u22120.41" and formatting.signed_percent(0.0) == "+0.00"
    assert formatting.number(3.14159) == "3.14" and formatting.significant(0.0001234) == "0.000123"
    assert [formatting.significant(value) for value in (0.12, 123.4, 1e-5, 0.0)] == ["0.120", "123", "1.00e-05", "0.00"]
    assert formatting.interval(0.87182, 0.89) == "87.18 to 89.00"
    assert formatting.interval(1.5, 20.25, formatting.significant) == "1.50 to 20.2"


def test_columns_of_the_accuracy_table_name_their_unit() -> None:
    row = {"top1": 0.9, "interval": (0.8, 0.95), "top5": 1.0, "recovery": 0.99, "agreement": 0.5, "kl": 0.01234}
    row |= {"sqnr": 12.34, "size_bytes": 2048, "bit_operations": 41e6, "seconds": 2.0}
    written = {column.heading: column.form(row[name]) for name, column in formatting.ACCURACY_COLUMNS.items()}
    assert written == {
        "top-1 %": "90.00",
        "95% interval": "80.00 to 95.00",
        "top-5 %": "100.00",
        "recovery %": "99.00",
        "agreement %": "50.00",
        "KL [nats]": "0.0123",
        "SQNR [dB]": "12.3",
        "size": "2.00 KiB",
        "bit operations": "41.0 M",
        "measured in": "2.0 s",
    }
