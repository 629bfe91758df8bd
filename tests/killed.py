"""Commands in processes of their own that are really killed, without the seconds that imports take each time.

A server process imports the heavy packages once and forks for each command; it is not this process that forks, which
threads of PyTorch would not survive.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from synthquant.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["synthquant.cli", "synthquant.pipeline", "torch._dynamo", "matplotlib.pyplot"])


def start(*arguments: object) -> ForkServerProcess:
    """Start a command."""
    process = _CONTEXT.Process(target=main, args=([str(argument) for argument in arguments],))
    process.start()
    return process


def finish(*arguments: object) -> None:
    """Run a command to its end."""
    process = start(*arguments)
    process.join()
    assert process.exitcode == 0


def kill_when(process: ForkServerProcess, appears: Path) -> None:
    """Kill a command (SIGKILL) as soon as a file is there."""
    deadline = time.monotonic() + 300
    while not appears.exists():
        assert process.is_alive(), f"the command ended before {appears} was there"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
