"""Several processes that do one piece of work together, started by `torchrun`, `accelerate launch` or their like.

A launcher tells each process by environment variables which one it is (`env://` of `torch.distributed`). Every process
calls the same functions in the same order; alone all of them are there and cost nothing. What goes wrong in one ends
all: the first process says it, the others raise `OtherProcessError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch import distributed as dist

from synthquant.core.device import resolve_device
from synthquant.core.errors import InputError, OtherProcessError

T = TypeVar("T")

# While the first process quantizes or measures, the others wait; those that died are noticed by their connections.
_PATIENCE = timedelta(days=7)
_ADDRESS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """Those that work together, seen from one of them."""

    rank: int = 0
    """Which one this is; 0 is the first, which alone writes files and tells what happens."""
    count: int = 1
    """How many there are."""

    @classmethod
    def current(cls) -> Processes:
        """Those of the default group of `torch.distributed`; without one, this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of rows `[N, ...]`, which `count` divides."""
        return rows if self.count == 1 else rows.chunk(self.count)[self.rank]

    def from_first(self, value: T) -> T:
        """Return the value of the first process; its tensors come to the CPU of the others if they were there."""
        if self.count == 1:
            return value
        values = [value]
        with _talking():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one device, in place, by their means over all processes: one message for all of them."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _talking():
            dist.all_reduce(flat)
        parts = torch.split(flat.div_(self.count), [tensor.numel() for tensor in tensors])
        means = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
        torch._foreach_copy_(list(tensors), means)

    def deal(self, whole: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return this process's share of rows of that shape, which only the first process has."""
        if self.count == 1:
            assert whole is not None
            return whole
        own = torch.empty((shape[0] // self.count, *shape[1:]), dtype=dtype, device=device)
        parts = None if whole is None else list(whole.contiguous().chunk(self.count))
        with _talking():
            dist.scatter(own, parts, src=0)
        return own

    def together(self, work: Callable[[], T]) -> T:
        """Do some work, which in itself is each process's own; if it fails in one of them, it fails in all.

        Raises:
            OtherProcessError: it failed elsewhere, or the first process tells what failed here.
        """
        if self.count == 1:
            return work()
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        for rank, text in enumerate(self._gathered(None if failure is None else str(failure) or repr(failure))):
            if text is None:
                continue
            if failure is not None and self.is_first:
                raise failure
            raise OtherProcessError(f"process {rank}: {text}") from failure
        return result

    def require_same(self, parts: Mapping[str, str]) -> None:
        """Raise `InputError`, in all processes, if what decides the work differs; texts by what they stand for."""
        if self.count == 1:
            return
        found = self._gathered(dict(parts))

        def check() -> None:
            for rank, other in enumerate(found):
                if names := [name for name in parts if other.get(name) != found[0].get(name)]:
                    raise InputError(
                        f"process {rank} has other {' and '.join(names)} than process 0; give all of them the same"
                    )

        self.together(check)

    def _gathered(self, value: T) -> list[T]:
        """What each process has."""
        values: list[T | None] = [None] * self.count
        with _talking():
            dist.all_gather_object(values, value)
        return cast("list[T]", values)


ALONE = Processes()
"""One process."""


class Followers:
    """The other processes, which wait for what the first one calls them to, and follow its `calls`."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._wait = processes.count > 1

    @contextmanager
    def called(self, make_work: Callable[[], object]) -> Iterator[None]:
        """Let the others do their part of what `make_work` describes; what fails in here is known to all of them."""
        if not self._wait:
            yield
            return
        work = make_work()
        self._wait = False
        self._processes.from_first(("work", work))
        self._processes.together(lambda: None)  # whether the others can
        yield
        self._wait = True

    @contextmanager
    def led(self) -> Iterator[Callable[[object], None]]:
        """Lead the others; yields what dismisses them with a last word. They are dismissed if something fails."""
        try:
            yield self._dismiss
        except BaseException as error:
            if self._wait:
                with suppress(OtherProcessError):  # others that are gone; what came first says more
                    self._processes.from_first(("failed", str(error) or type(error).__name__))
            raise

    def _dismiss(self, word: object) -> None:
        if self._wait:
            self._processes.from_first(("done", word))
            self._wait = False


def follow(processes: Processes, prepare: Callable[[Any], Callable[[], object]]) -> Any:
    """Prepare and do what the first process calls the others to, until it dismisses them; returns its last word.

    Raises `OtherProcessError` if something fails there.
    """
    while True:
        kind, content = processes.from_first(("", None))
        if kind == "failed":
            raise OtherProcessError(f"process 0: {content}")
        if kind == "done":
            return content
        processes.together(partial(prepare, content))()


@contextmanager
def joined(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the other processes that a launcher started, if it did; yields them and the device of this one.

    Args:
        device: as `resolve_device` takes it. An accelerator without a number is that of the process's place on its
            machine.

    Raises:
        InputError: there is no such device, or not one for each process of this machine.
        OtherProcessError: the others cannot be reached.
    """
    own = resolve_device(device)
    if (dist.is_available() and dist.is_initialized()) or launched().count == 1:
        yield Processes.current(), own
        return
    if not dist.is_available():
        raise InputError("this build of PyTorch has no torch.distributed, which several processes need")
    backend = "gloo"
    if own != "cpu":
        kind, _, number = own.partition(":")
        if number:
            raise InputError(f"device {own!r} is one for {launched().count} processes; leave its number out")
        own = resolve_device(f"{kind}:{os.environ.get('LOCAL_RANK', '0')}")
        torch.accelerator.set_device_index(torch.device(own).index)
        backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    with _talking():
        dist.init_process_group(backend, timeout=_PATIENCE)
    yield Processes.current(), own
    # Not where something failed: to take leave of accelerators that wait for us would be to wait as well.
    dist.destroy_process_group()


def launched() -> Processes:
    """This process among those that a launcher started."""
    if not all(os.environ.get(name) for name in _ADDRESS):
        return ALONE
    try:
        rank, count = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    except ValueError:
        return ALONE
    return Processes(rank, count)


@contextmanager
def _talking() -> Iterator[None]:
    """Say in one line what libraries say when another process is gone."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # `DistError` is a `RuntimeError`
        raise OtherProcessError("another process ended or cannot be reached; its own output says more") from error
