"""Passes over units for tests of the engine, without a method around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from synthquant.quantize import AdaRound
from synthquant.quantize.learn import Phase


def a_phase(**changes: Any) -> Phase:
    """AdaRound's pass of few steps, changed."""
    return replace(AdaRound(iterations=200, batch_size=16).rounding_phase(), **changes)
