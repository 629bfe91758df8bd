"""Ctrl-C and SIGTERM, from a program's first moment to its last.

Nothing but the standard library is loaded here: these handlers stand before PyTorch is, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import NoReturn

# Ctrl-C goes to all processes of a terminal, and those that started us pass it on: that is one request, not two.
_ONE_REQUEST_SECONDS = 0.3
_SHOW_CURSOR = "\x1b[?25h"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal ended the command; the message says what is kept."""


class MemoryRanOut(Exception):
    """The command needs more memory than there is; the message says what to lower."""


class Stop:
    """The request to stop. The first one unwinds what runs, a second one ends the process where it is."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._loading = True
        self._since = 0.0

    def listen(self) -> None:
        """Answer signals from now on, except ones that whoever started us ignores (`nohup`, `&` in a script)."""
        self.received, self._loading = None, True
        if threading.current_thread() is threading.main_thread():
            for one in _SIGNALS:
                if signal.getsignal(one) is not signal.SIG_IGN:
                    signal.signal(one, self)

    def loaded(self) -> None:
        """From now on there is something to unwind."""
        self._loading = False

    @property
    def status(self) -> int:
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.received or signal.SIGINT)

    def line(self, kept: str) -> str:
        """Return what to say in the end."""
        return f"{'terminated' if self.received == signal.SIGTERM else 'interrupted'}: {kept}"

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: raise `KeyboardInterrupt`, or quit."""
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
            if self._loading:
                self._quit("nothing was begun")
            raise KeyboardInterrupt
        if time.monotonic() - self._since > _ONE_REQUEST_SECONDS:
            self._quit("stopped at once; what was finished is kept")

    def _quit(self, kept: str) -> NoReturn:
        # The streams may be in the middle of a write, and modules half imported: past all of them.
        restored = _SHOW_CURSOR if os.isatty(2) else ""
        with suppress(OSError):
            os.write(2, f"{restored}{self.line(kept)}\n".encode())
        os._exit(self.status)


STOP = Stop()
"""Signals are sent to a process, so there is one."""


def show_cursor() -> None:
    """Show the cursor that progress bars hide, should one have been stopped before it could."""
    if sys.stderr.isatty():
        sys.stderr.write(_SHOW_CURSOR)
