"""Locks of the operating system on folders and temporary files, and what killed processes left behind.

A lock is a `flock` on the folder or file itself: there is no lock file, and none outlives its process. A temporary
file or folder is called `.NAME.HEX.tmp` and locked by the process that fills it, so one that nobody locks was left by
a process that was killed. Where the system has no such locks (Windows, some network file systems) nothing is refused
and nothing is taken for a leftover.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from synthquant.core.errors import OutputError

if sys.platform != "win32":
    import fcntl

FORMER = "former"
"""Inside a temporary folder: what was at the path before, while the new takes its place."""

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.tmp")
_ATTEMPTS = 100
_COMMAND_SHOWN = 120


def temporary_sibling(path: Path) -> Path:
    """Return a new name beside `path` for what is to become `path`."""
    return path.parent / f".{path.name}.{uuid4().hex[:12]}.tmp"


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it is not there and stays.

    Raises `OutputError` naming the process that holds it, or if the folder cannot be made.
    """
    handle = None
    try:
        for _ in range(_ATTEMPTS):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make folder {folder}: {error.strerror or error}") from error
            handle = _open(folder)
            if handle is None:
                break
            if _lock(handle) is False:
                raise _busy(folder, handle)
            # Before it was locked, another process whose work failed may have removed it.
            if _is_at(handle, folder):
                break
            os.close(handle)
            handle = None
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, whose lock keeps other processes from making `path` too.

    It is removed at the end; what killed processes left of making `path` is removed before. Raises `OutputError` naming
    the process that is making `path`, or if the folder cannot be made.
    """
    try:
        temporary, handle = _locked_temporary(path, _make_folder)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        _refuse_second(path, temporary)
        remove_leftovers(path.parent, path.name)
        yield temporary
    finally:
        # What was put aside and could not be put back is left for the next process to try.
        if path.exists() or not (temporary / FORMER).exists():
            shutil.rmtree(temporary, ignore_errors=True)
        if handle is not None:
            os.close(handle)


@contextmanager
def temporary_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield a new locked file beside `path`, open for writing; it is removed at the end if it is still there.

    What killed processes left of writing `path` is removed before. Raises `OSError`.
    """
    remove_leftovers(path.parent, path.name)
    temporary, handle = _locked_temporary(path, _make_file)
    assert handle is not None
    with os.fdopen(handle, "wb") as file:
        try:
            yield temporary, file
        finally:
            if sys.platform == "win32":  # which removes no open file
                file.close()
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str | None = None, *, deep: bool = False) -> None:
    """Remove temporary files and folders in `folder` that no process holds: of one `name`, or of all names.

    What had been put aside to be replaced, and was not yet, is put back. `deep` looks into all folders inside as well.
    What cannot be removed stays.
    """
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _TEMPORARY.fullmatch(entry.name)
            if found is not None and name in (None, found["name"]):
                _remove_if_dead(folder / entry.name, folder / found["name"])
            elif deep and entry.is_dir(follow_symlinks=False):
                remove_leftovers(folder / entry.name, deep=True)


def _remove_if_dead(leftover: Path, path: Path) -> None:
    handle = _open(leftover, follow=False)
    if handle is None:
        return
    try:
        if not _lock(handle):
            return
        if (leftover / FORMER).exists() and not path.exists():
            os.replace(leftover / FORMER, path)
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    finally:
        os.close(handle)


def _locked_temporary(path: Path, make: Callable[[Path], int | None]) -> tuple[Path, int | None]:
    """Make what is to become `path` and lock it; again, if it is taken for a leftover before it is locked."""
    for _ in range(_ATTEMPTS):
        temporary = temporary_sibling(path)
        handle = make(temporary)
        if handle is None or (_lock(handle) is not False and _is_at(handle, temporary)):
            return temporary, handle
        os.close(handle)
    raise OSError(errno.EAGAIN, "other processes keep removing temporary files", str(path.parent))


def _make_folder(path: Path) -> int | None:
    path.mkdir()
    return _open(path, follow=False)


def _make_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def _refuse_second(path: Path, own: Path) -> None:
    """Raise `OutputError` if another process has claimed `path`."""
    for entry in path.parent.iterdir():
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None or found["name"] != path.name or entry == own or not entry.is_dir():
            continue
        handle = _open(entry, follow=False)
        if handle is None:
            continue
        try:
            if _lock(handle) is False:
                raise _busy(path, handle)
        finally:
            os.close(handle)


def _open(path: Path, *, follow: bool = True) -> int | None:
    """A handle to lock by; none where the system opens no folders, or if the path is gone, or a link not to follow."""
    if sys.platform == "win32":
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    except OSError:
        return None


def _lock(handle: int) -> bool | None:
    """Take the lock, without waiting; false if another process holds it, none where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno == errno.EWOULDBLOCK else None
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file or folder is the one at `path`."""
    try:
        there = path.stat()
    except OSError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _busy(path: Path, handle: int) -> OutputError:
    return OutputError(
        f"{path} is being written by {_holder(handle)}; wait until it is done, stop it, or choose another place"
    )


def _holder(handle: int) -> str:
    """The process that holds the lock of an open file, with its command line where the system tells (Linux)."""
    status = os.fstat(handle)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            # 1: FLOCK  ADVISORY  WRITE 8002 fe:00:2154705 0 EOF
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == device and int(fields[4]) > 0:
                return f"process {fields[4]}{_command_of(int(fields[4]))}"
    return "another process"


def _command_of(process: int) -> str:
    with suppress(OSError):
        raw = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        shown = " ".join("".join(one if one.isprintable() else " " for one in raw).split())
        if shown:
            return f" ({shown if len(shown) <= _COMMAND_SHOWN else shown[:_COMMAND_SHOWN] + '...'})"
    return ""
