"""The command line: parse, call, print. Every command is a function of the library with options around it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from synthquant.cli.stop import STOP
from synthquant.core.allocator import ALLOCATOR
from synthquant.core.memory import ran_out

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 if all that was promised is there, 2 for a wrong command line, 1 for other errors.

    130 and 143 after Ctrl-C and SIGTERM, which are answered from here on: the commands are loaded only now.
    """
    STOP.listen()
    ALLOCATOR.keep_freed()
    try:
        from synthquant.cli.app import run
    except (ImportError, MemoryError, OSError) as error:
        if ran_out(error) is None:
            raise
        print(
            "error: main memory ran out while packages were loaded; end other programs or raise its limit",
            file=sys.stderr,
        )
        sys.exit(1)
    STOP.loaded()
    sys.exit(run(arguments))
