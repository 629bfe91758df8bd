"""Commands in processes of their own, and what became of them.

A child is forked from this process, which has the package loaded but has done no work with it: the command starts at
once instead of after seconds of imports, and can be killed like any other process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from synthquant.cli import main
from synthquant.cli.group import COMMANDS, load_command

Verdict = Literal["identical", "refused", "wrong"]

NETWORK = "zoo/cifar10-resnet20"
for _name in COMMANDS:
    load_command(_name)  # so that a child need not
_VARIES = frozenset(("seconds", "peak_memory_bytes", "environment", "sha256", "quick_seconds"))
"""Keys of JSON files that differ between two runs of the same work."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `status` is None if it had to be stopped, negative for a signal."""

    status: int | None
    out: str
    err: str
    seconds: float

    @property
    def traceback(self) -> bool:
        """Whether a person saw a traceback."""
        return "Traceback (most recent call last)" in self.err + self.out

    @property
    def refused(self) -> bool:
        """Whether it ended with one line that says why."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        last = self.err.rstrip("\n").rpartition("\n")[2]
        return self.status in (1, 2) and len(errors) == 1 and last == errors[0] and not self.traceback

    def brief(self) -> str:
        """The last thing it said."""
        if self.status is None:
            return f"still running after {self.seconds:.0f} s"
        return (self.err.rstrip("\n").rpartition("\n")[2] or self.out.rstrip("\n").rpartition("\n")[2])[:300]


def run(arguments: Sequence[object], folder: Path, *, kill_after: float | None = None, limit: float = 300) -> Outcome:
    """Run `synthquant ARGUMENTS` in `folder`; with `kill_after` end it with SIGKILL after so many seconds."""
    out, err = (folder.parent / f"{folder.name}.{name}" for name in ("out", "err"))
    started = time.perf_counter()
    child = start(lambda: main([str(argument) for argument in arguments]), folder, out, err)
    status = _wait(child, started, limit if kill_after is None else kill_after)
    if status is None:
        os.kill(child, signal.SIGKILL)
        _, code = os.waitpid(child, 0)
        status = None if kill_after is None else os.waitstatus_to_exitcode(code)
    outcome = Outcome(status, *(file.read_text(errors="replace") for file in (out, err)), time.perf_counter() - started)
    out.unlink()
    err.unlink()
    return outcome


def start(work: Callable[[], None], folder: Path, out: Path, err: Path) -> int:
    """Do some work in a child, in a folder, with files for what it prints; returns its process number."""
    child = os.fork()
    if child == 0:
        _become(work, folder, out, err)
    return child


def _wait(child: int, started: float, seconds: float) -> int | None:
    while time.perf_counter() - started < seconds:
        found, code = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.002)
    return None


def _become(work: Callable[[], None], folder: Path, out: Path, err: Path) -> None:
    """In the child: work, and never return."""
    status = 70
    try:
        os.chdir(folder)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        torch.set_num_threads(1)
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder and what it holds, without times and hardware; leftovers of a kill are files too."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = _content(path)
        elif path.name.endswith(".tmp"):
            found[str(path.relative_to(folder))] = "a folder"
    return found


def _content(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".json":
        return stable(json.loads(data))
    if path.suffix == ".html":  # times stand in it
        return re.sub(rb"\d", b"", data).rpartition(b"</html>")[1]
    return data


def stable(value: Any) -> Any:
    """A JSON value without what differs between two runs of the same work."""
    if isinstance(value, dict):
        return {key: stable(inner) for key, inner in value.items() if key not in _VARIES}
    return [stable(inner) for inner in value] if isinstance(value, list) else value


def leftovers(folder: Path, expected: dict[str, Any]) -> list[str]:
    """Files that an undisturbed command does not leave."""
    return sorted(name for name in contents(folder) if name not in expected)


def copy(source: Path, target: Path) -> Path:
    """A copy of a file or folder to spoil."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    return target
