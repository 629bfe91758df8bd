"""Files below a folder, each once, with the reason why one cannot be read; links, pipes and loops do no harm."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from synthquant.core.errors import DataError
from synthquant.data.codec import kind_of_file

_LINK_FAULTS = {errno.ENOENT: "a link to nothing", errno.ELOOP: "a link that leads back to itself"}


@dataclass(frozen=True)
class Found:
    """An entry below a folder."""

    name: str
    """Path relative to the folder, as the system gives it."""
    reason: str | None = None
    """Why it is no file that can be read; none: it is one."""
    folder: str = ""
    """Where the folder that holds it really lies."""
    target: str | None = None
    """For a link, the file it leads to."""


def files_in(root: Path) -> list[Found]:
    """Return the files in `root` itself, as `files_below` does. Raises `DataError` if `root` cannot be read."""
    with _opened(root) as entries:
        found = sorted((one for one in entries if not one.name.startswith(".")), key=lambda one: one.name)
    folder = os.path.realpath(root)
    return _each_once([_found(one, one.name, folder) for one in found if not _is_folder(one)])


def files_below(root: Path, inner: str = ".") -> list[Found]:
    """Return the files in `root/inner` and below, in an order that does not depend on the system.

    Links are followed, but each folder is read once and each file is returned once; what is left out is returned too,
    with its reason. Hidden files and folders are not looked at.
    """
    seen = {os.path.realpath(root)} if inner != "." else set()
    return _each_once(list(_walk(root, inner, seen)))


def folders_in(root: Path) -> list[str]:
    """Return the names of the folders (or links to them) in `root`, sorted, without hidden ones.

    Raises `DataError` if `root` cannot be read.
    """
    with _opened(root) as entries:
        return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))


def printable(name: str) -> str:
    """Return a file's name as text that can be written and shown anywhere: other bytes and characters as escapes."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace") if _has_raw_bytes(name) else name
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def file_kind(path: Path) -> str | None:
    """Return `file`, `folder`, or none where there is nothing of that name.

    Raises `DataError` for a pipe, a device or a socket, for a link to nothing, and for what may not be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise DataError(f"{printable(str(path))} is a link to nothing") from None
        return None
    except ValueError:  # a null byte: no file has such a name
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise DataError(f"cannot read {printable(str(path))}: {error.strerror or error}") from error
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return "file" if stat.S_ISREG(mode) else "folder"
    raise DataError(f"{printable(str(path))} is {kind_of_file(mode)}, not a file or folder of images")


@contextmanager
def _opened(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as error:
        raise DataError(f"cannot read {printable(str(folder))}: {error.strerror or error}") from error


def _walk(root: Path, start: str, seen: set[str]) -> Iterator[Found]:
    waiting = [start]
    while waiting:
        inner = waiting.pop()
        folder = os.path.realpath(root / inner)
        if folder in seen:
            yield Found(inner, "a link to a folder that is read already")
            continue
        seen.add(folder)
        try:
            with os.scandir(folder) as found:
                entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda one: one.name)
        except OSError as error:
            yield Found(inner, f"cannot be read: {error.strerror or error}")
            continue
        inside = []
        for entry in entries:
            name = entry.name if inner == "." else f"{inner}/{entry.name}"
            if _is_folder(entry):
                inside.append(name)
            else:
                yield _found(entry, name, folder)
        waiting += reversed(inside)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that may not be followed
        return False


def _found(entry: os.DirEntry[str], name: str, folder: str) -> Found:
    link = entry.is_symlink()
    try:
        if not link and entry.is_file():
            return Found(name, folder=folder)
        mode = entry.stat().st_mode
    except OSError as error:
        known = _LINK_FAULTS.get(error.errno or 0) if link else None
        return Found(name, known or f"cannot be read: {error.strerror or error}")
    if not stat.S_ISREG(mode):
        return Found(name, f"{kind_of_file(mode)}, not a file")
    return Found(name, folder=folder, target=os.path.realpath(entry.path))


def _each_once(found: list[Found]) -> list[Found]:
    """Leave out links to files that are there by themselves, and all but the first link to one file."""
    if all(one.target is None for one in found):
        return found
    real = {
        os.path.join(one.folder, os.path.basename(one.name)): one.name
        for one in found
        if one.target is None and one.reason is None
    }
    kept = []
    for one in found:
        if one.target is not None and one.target in real:
            kept.append(Found(one.name, f"the same file as {printable(real[one.target])}"))
            continue
        if one.target is not None:
            real[one.target] = one.name
        kept.append(one)
    return kept


def _has_raw_bytes(name: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in name)
