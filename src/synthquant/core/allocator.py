"""glibc's allocator: whether memory that is freed stays with the process.

Nothing but the standard library is loaded here: the commands set this before PyTorch allocates anything.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys

_KEPT = "glibc, freed memory is kept"
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


class Allocator:
    """The allocator of this process, which is glibc's on most of Linux and is left alone elsewhere.

    By default glibc returns every large block to the system when it is freed, so each step of an optimisation asks for
    all its tensors' pages anew, and the system clears them: about a fifth of the processor time of inversion at
    224x224. Raising the size from which blocks are mapped on their own is not enough, as it may be 32 MiB at most.
    """

    def __init__(self) -> None:
        self.state = "the system's default"
        """What was done, for the record of a run."""

    def keep_freed(self) -> None:
        """Keep what is freed for the next allocation, unless the environment has settings of its own."""
        if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
            return
        if own := _own_settings():
            self.state = f"as {own} says"
            return
        mallopt = ctypes.CDLL(None).mallopt
        # Both or none: blocks on a heap that is trimmed would come and go in even smaller pieces.
        if mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1):
            self.state = _KEPT

    def give_back(self) -> None:
        """Return to the system what is kept and not in use, so that the next stage's memory is its own."""
        if self.state == _KEPT:
            ctypes.CDLL(None).malloc_trim(0)


def _own_settings() -> str | None:
    """Return the variable by which whoever started the process chose how memory is allocated."""
    for name, value in os.environ.items():
        chosen = name.startswith("MALLOC_")
        chosen = chosen or (name == "GLIBC_TUNABLES" and "glibc.malloc." in value)
        if value and (chosen or (name == "LD_PRELOAD" and "malloc" in value)):
            return name
    return None


ALLOCATOR = Allocator()
"""A process has one."""
