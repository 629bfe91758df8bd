"""Damages to a file, spread over all of it, and what may come of them: the same result, or one line that refuses."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from synthquant.core.errors import SynthquantError
from synthquant.core.progress import Progress

T = TypeVar("T")


class Warned(Progress):
    """Remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def damages(data: bytes, flips: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield what was done and the result: bits flipped at places spread over `data`, ends cut off, a byte added."""
    draw = random.Random(seed)
    for number in range(flips):
        low, high = number * len(data) // flips, max((number + 1) * len(data) // flips - 1, 0)
        place, bit = draw.randint(min(low, high), high), 1 << draw.randrange(8)
        yield f"bit {bit} of byte {place}", data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
    for size in sorted({0, 1, 9, len(data) // 3, len(data) - 1}):
        yield f"cut off at {size}", data[:size]
    yield "longer by a byte", data + b"\0"


def same_or_refused(path: Path, use: Callable[[], T], *, flips: int = 40, seed: int = 0) -> int:
    """Call `use` after each damage to the file at `path`, and return how many were refused.

    Whatever is not refused must return what it returns for the file as it was, which is put back at the end.
    """
    data, expected = path.read_bytes(), use()
    refused = 0
    try:
        for what, content in damages(data, flips, seed):
            path.write_bytes(content)
            try:
                found = use()
            except SynthquantError as error:
                assert "\n" not in str(error) and path.name in str(error), f"{what}: {error}"
                refused += 1
            else:
                assert found == expected, f"{what}: accepted, with another result"
    finally:
        path.write_bytes(data)
    return refused
