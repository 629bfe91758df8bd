"""A Ray cluster: connecting to it, and workers on it that do pieces of work in order, lost ones again."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any
from urllib.parse import urlsplit

import torch

from synthquant.core.allocator import ALLOCATOR
from synthquant.core.errors import InputError, MissingExtraError, SynthquantError

RESTARTS = 3
"""How often a lost worker, and what it was at, is started again."""

_AHEAD = 2
_CONNECT_SECONDS = 5.0


class Worker:
    """Base of what runs in processes of its own. What goes wrong while it is made is kept for the one who asks.

    On a CPU it computes in as many threads as the process that asks: sums depend on it in their last bits.
    """

    def __init__(self, task: Any, threads: int) -> None:
        import ray

        ALLOCATOR.keep_freed()
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        if device == "cpu":
            torch.set_num_threads(threads)
        self._error: SynthquantError | None = None
        try:
            self.open(task, device)
        except SynthquantError as error:  # raised here, Ray would take it for a crash and start again
            self._error = error

    def open(self, task: Any, device: str) -> None:
        """Get ready for the task."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """What the worker has opened; raises what went wrong when it was."""
        if self._error is not None:
            raise self._error
        return self._opened()

    def pid(self) -> int:
        """Number of the process."""
        return os.getpid()

    def _opened(self) -> str:
        raise NotImplementedError


class WorkerPool:
    """Workers of one class.

    Args:
        ray: what `ray_session` gave.
        worker: the class.
        task: what each of them is made for.
        count: how many; none: one for each GPU, without GPUs one for each machine.
        most: pieces of work; more workers than that are not started.

    Raises:
        InputError: the cluster has no room for so many, or one was lost again and again.
        SynthquantError: what a worker raised when it was made.
    """

    def __init__(self, ray: Any, worker: type[Worker], task: Any, count: int | None, most: int) -> None:
        self._ray = ray
        total = ray.cluster_resources()
        gpus, cpus = int(total.get("GPU", 0)), max(1, int(total.get("CPU", 1)))
        wanted = count or gpus or len(ray.nodes())
        needs = {"num_gpus": 1} if gpus else {"num_cpus": max(1, cpus // wanted)}
        if wanted > (gpus or cpus):
            raise InputError(f"{wanted} workers on a Ray cluster of {gpus} GPUs and {cpus} CPUs; ask for fewer")
        remote = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **needs)(worker)
        self.workers = [remote.remote(task, torch.get_num_threads()) for _ in range(max(1, min(wanted, most)))]
        self.fingerprints: list[str] = self.get([one.fingerprint.remote() for one in self.workers])

    def in_order(self, method: str, pieces: Iterable[Any]) -> Iterator[Any]:
        """Yield what `method` of the workers makes of each piece, in order, several at a time."""
        waiting: deque[Any] = deque()
        todo = enumerate(pieces)
        while True:
            while len(waiting) < _AHEAD * len(self.workers) and (following := next(todo, None)) is not None:
                number, piece = following
                waiting.append(getattr(self.workers[number % len(self.workers)], method).remote(piece))
            if not waiting:
                return
            yield self.get(waiting.popleft())

    def get(self, promised: Any) -> Any:
        """Wait for an answer of workers."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(promised)
        except errors.RayTaskError as error:
            if isinstance(error.cause, SynthquantError):
                raise error.cause from error
            raise
        except errors.RayActorError as error:
            raise InputError(
                f"a worker of Ray was lost {RESTARTS + 1} times; what is written is kept, the same command goes on"
                f" ({_last_line(error)})"
            ) from error
        except errors.RayError as error:
            raise InputError(f"Ray failed: {_last_line(error)}; what is written is kept") from error


@contextmanager
def ray_session(address: str) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine for `local`; what runs already in this process is used.

    Ray prints to standard output when a worker dies; meanwhile that goes to standard error.
    Raises `InputError` if nothing answers, `MissingExtraError` if ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray", "--ray") from error
    if ray.is_initialized():
        yield ray
        return
    local = address == "local"
    if not local and address != "auto":
        _require_answer(address)
    options: dict[str, Any] = {"include_dashboard": False} if local else {}
    try:
        with _sigterm_as_it_was():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise InputError(f"no Ray cluster answers at {address!r}: {_last_line(error)}") from error
    try:
        with redirect_stdout(sys.stderr):
            yield ray
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_as_it_was() -> Iterator[None]:
    """Keep a handler of SIGTERM that somebody set: Ray puts one in its place that ends the process without a word."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _require_answer(address: str) -> None:
    """Look whether anybody listens there: Ray itself would try for minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        raise InputError(f"Ray address {address!r} is not of the form HOST:PORT; write that, auto or local")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address!r} ({error.strerror or error}); check the address, or use local"
        ) from error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
