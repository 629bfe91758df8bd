"""What the processor can do."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_INFO = Path("/proc/cpuinfo")


@cache
def cpu_flags() -> frozenset[str]:
    """Return the names of the instruction sets, as Linux tells them; empty elsewhere."""
    return frozenset(_INFO.read_text().split()) if _INFO.exists() else frozenset()


def has_vnni() -> bool:
    """Whether the CPU adds four products of 8-bit integers at a time in 32 bits.

    Without it, pairs are added in 16 bits, where they may overflow, and integers may not be faster than floats.
    """
    return not cpu_flags().isdisjoint(("avx512_vnni", "avx_vnni", "asimddp"))
