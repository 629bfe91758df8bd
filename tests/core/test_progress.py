from __future__ import annotations

import io
import logging
import re
import time

import pytest

from synthquant.core.progress import QUIET, ConsoleProgress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_line_for_each_finished_bar_off_a_terminal() -> None:
    stream = io.StringIO()
    progress = ConsoleProgress(stream)
    with progress.bar("reconstruct", 2) as outer:
        with progress.bar("unit", 10) as inner:
            inner.advance(4, loss=0.5)
            inner.advance(6, loss=0.12345)
        progress.warn("unit diverged")
        outer.advance(2, unit="layer1")
    lines = stream.getvalue().splitlines()
    assert re.fullmatch(r"unit: 10/10 in \d+\.\d\d? s, loss 0\.1235", lines[0])
    assert lines[1] == "warning: unit diverged"
    assert re.fullmatch(r"reconstruct: 2/2 in \d+\.\d\d? s, unit layer1", lines[2])
    assert len(lines) == 3


def test_a_bar_that_fails_prints_no_finished_line() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyError), ConsoleProgress(stream).bar("work", 2):
        raise KeyError
    assert stream.getvalue() == ""


def test_bars_and_messages_on_a_terminal() -> None:
    stream = _Terminal()
    progress = ConsoleProgress(stream)
    with progress.bar("outer [x]", 3) as outer:
        with progress.bar("inner", 5) as inner:
            inner.advance(5, loss=0.25)
        progress.say("brackets [stay] as they are")
        outer.advance(3)
    with progress.bar("again", 1) as bar:
        bar.advance()
    text = stream.getvalue()
    assert "outer [x]" in text
    assert "3/3" in text
    assert "brackets [stay] as they are" in text
    assert "again" in text


def test_quiet_counts_and_logs(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "synthquant"), QUIET.bar("work", 5) as bar:
        bar.advance(2, loss=1.0)
        bar.advance()
        QUIET.say("said")
        QUIET.warn("warned")
    assert (bar.done, bar.total, bar.summary()) == (3, 5, "loss 1")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "said"),
        ("WARNING", "warned"),
    ]
    assert capsys.readouterr().out == ""


def lines_of(stream: io.StringIO, count: int) -> list[str]:
    """Wait for as many lines: another thread writes them."""
    end = time.monotonic() + 10
    while stream.getvalue().count("\n") < count and time.monotonic() < end:
        time.sleep(0.002)
    return stream.getvalue().splitlines()


def test_off_a_terminal_a_long_bar_is_told_of_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("synthquant.core.progress.EVERY", 0.01)
    stream = io.StringIO()
    with ConsoleProgress(stream).bar("reconstruct", 7) as bar:
        bar.advance(3, loss=0.5)
        between = lines_of(stream, 2)
    assert all(re.fullmatch(r"reconstruct: 3/7 after \d+\.\d\d? s, loss 0\.5", line) for line in between)
    assert stream.getvalue().splitlines()[-1].startswith("reconstruct: 3/7 in ")


def test_what_takes_long_and_has_no_steps_is_said_and_what_does_not_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    with ConsoleProgress(stream).waiting("open resnet18"):
        pass
    assert stream.getvalue() == ""
    monkeypatch.setattr("synthquant.core.progress.SLOW", 0.01)
    with ConsoleProgress(stream).waiting("open resnet18"):
        assert lines_of(stream, 1) == ["open resnet18 ..."]
