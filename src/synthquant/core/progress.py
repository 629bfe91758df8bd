"""Progress bars and messages; nothing else in the package writes to the terminal."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from synthquant.core.formatting import duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

EVERY = 30.0
"""Seconds between lines about a bar that is not finished, where there is no terminal to draw it on."""
SLOW = 2.0
"""Seconds after which it is said what one waits for."""

_LOGGER = logging.getLogger("synthquant")


class Bar:
    """Counts the steps of one piece of work. This one only counts."""

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self.fields: dict[str, float | str] = {}

    def advance(self, steps: int = 1, **fields: float | str) -> None:
        """Count `steps` and show `fields` beside the bar.

        Fields are plain numbers or text: reading one from a GPU tensor waits for the GPU, so pass them rarely.
        """
        self.done += steps
        self.fields.update(fields)

    def summary(self) -> str:
        """Return the fields as text, for example `loss 0.124, lr 0.001`."""
        return ", ".join(f"{name} {_shown(value)}" for name, value in self.fields.items())


class Progress:
    """The quiet kind: bars only count, messages go to the `synthquant` logger.

    Warnings are therefore still seen in a program that configures no logging (Python prints them to standard error).
    """

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """Yield the bar of a piece of work of `total` steps."""
        yield Bar(title, total)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Do work that has no steps, such as opening a network; `text` says what."""
        yield

    def say(self, text: str) -> None:
        """Tell something of interest."""
        _LOGGER.info(text)

    def warn(self, text: str) -> None:
        """Tell something that may make the result worse than expected."""
        _LOGGER.warning(text)


QUIET = Progress()
"""The default wherever a function takes `progress`."""


class Silent(Progress):
    """Says nothing at all: of several processes that do the same, one tells it."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""


class ConsoleProgress(Progress):
    """Bars on a terminal; elsewhere one line for each finished bar, and one every half minute until then.

    Bars may be nested. Messages appear above running bars.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self._live: RichProgress | None = None
        self._open_bars = 0

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """Yield the bar of a piece of work of `total` steps."""
        show = self._live_bar if self.stream.isatty() else self._line_bar
        with show(title, total) as bar:
            yield bar

    def say(self, text: str) -> None:
        """Print a line."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """Print a line that starts with `warning:`."""
        self.say(f"warning: {text}")

    @contextmanager
    def _line_bar(self, title: str, total: int) -> Iterator[Bar]:
        bar = Bar(title, total)
        started = time.perf_counter()

        def line(word: str) -> str:
            summary = bar.summary()
            return f"{title}: {bar.done}/{total} {word} {duration(time.perf_counter() - started)}" + (
                f", {summary}" if summary else ""
            )

        with _meanwhile(lambda: self.say(line("after")), EVERY):
            yield bar
        self.say(line("in"))

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Do work that has no steps; say what it is once it takes longer than two seconds."""
        started = time.perf_counter()

        def tell() -> None:
            seconds = time.perf_counter() - started
            self.say(f"{text} ..." if seconds < EVERY else f"{text}, after {duration(seconds)}")

        with _meanwhile(tell, SLOW, EVERY):
            yield

    @contextmanager
    def _live_bar(self, title: str, total: int) -> Iterator[Bar]:
        # One rich display holds all open bars; it starts with the first and ends with the last.
        if self._live is None:
            self._live = _new_display(self.stream)
            self._live.start()
        self._open_bars += 1
        bar = _LiveBar(title, total, self._live)
        try:
            yield bar
        finally:
            self._open_bars -= 1
            if self._open_bars == 0:
                self._live.stop()
                self._live = None
            else:  # an inner bar has said its piece; many of them would fill the screen
                bar.remove()


@contextmanager
def _meanwhile(tell: Callable[[], None], first: float, every: float | None = None) -> Iterator[None]:
    """Call `tell` from another thread while the body runs: after `first` seconds, and then every `every` ones."""
    over = threading.Event()

    def wait() -> None:
        seconds = first
        while not over.wait(seconds):
            tell()
            seconds = first if every is None else every

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _LiveBar(Bar):
    """A bar drawn by rich."""

    def __init__(self, title: str, total: int, display: RichProgress) -> None:
        super().__init__(title, total)
        self._display = display
        self._task: TaskID = display.add_task(title, total=total, summary="")

    def advance(self, steps: int = 1, **fields: float | str) -> None:
        """Count `steps` and show `fields` beside the bar."""
        super().advance(steps, **fields)
        self._display.update(self._task, completed=self.done, summary=self.summary())

    def remove(self) -> None:
        """Take the bar off the screen."""
        self._display.remove_task(self._task)


def _new_display(stream: TextIO) -> RichProgress:
    from rich import progress as rich_progress
    from rich.console import Console

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[summary]}", markup=False),
        console=Console(file=stream),
    )


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
