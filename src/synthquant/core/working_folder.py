"""A folder while one process fills it: locked, cleared of leftovers, and nothing of value lost whatever goes wrong."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from synthquant.core import formatting
from synthquant.core.errors import OutputError, SynthquantError
from synthquant.core.files import empty_folder, made_folder, require_writable
from synthquant.core.locks import locked_folder, remove_leftovers

# What helps where the system takes no more.
_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EFBIG: "raise the limit of a file's size",
    errno.EROFS: "make it writable",
    errno.EIO: "see to that disk",
}
_NOT_ALLOWED = (errno.EACCES, errno.EPERM)


class StoppedWriting(OutputError):
    """The system took no more in the middle of the work; the message says what is kept."""


@contextmanager
def working_folder(folder: Path, worthless: Collection[str]) -> Iterator[None]:
    """Make `folder`, hold its lock, and if an error ends the work take it away again unless it holds anything of value.

    Args:
        folder: what is filled; if it held files before, none is removed but what killed processes left unfinished.
        worthless: files, relative to `folder`, that only say what was asked for. Any other file is kept.

    Raises:
        OutputError: the folder cannot be made or written, another process is writing it, or the system let no more be
            written, for one because the disk is full; the message then says what is kept.
    """
    require_writable(folder)
    with made_folder(folder), locked_folder(folder):
        remove_leftovers(folder)
        is_new = not any(folder.iterdir())
        try:
            yield
        except OSError as error:
            kept = not is_new or not _removed(folder, worthless)
            remedy = _remedy(error)
            if isinstance(error, StoppedWriting) or remedy is None:
                raise
            what = str(error) if isinstance(error, OutputError) else f"cannot write in {folder}: {error.strerror}"
            if not kept:  # in here; a folder around this one may say more
                raise OutputError(what) from error
            advice = f"{remedy} and give the same command again to go on from there"
            raise StoppedWriting(f"{what}; what is finished stays in {folder}: {advice}") from error
        except (SynthquantError, MemoryError, RuntimeError):  # the last two: how libraries say that memory ran out
            if is_new:
                _removed(folder, worthless)
            raise


def require_space(folder: Path, needed: Mapping[str, int]) -> None:
    """Raise `OutputError` if the disk of `folder` has less free space than the sum of `needed` [bytes by what for]."""
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    free, total = shutil.disk_usage(existing).free, sum(needed.values())
    if total > free:
        parts = ", ".join(f"{what} {formatting.size(size)}" for what, size in needed.items() if size)
        raise OutputError(
            f"{folder} needs about {formatting.size(total)} ({parts}) but its disk has {formatting.size(free)} free; "
            "free some, ask for fewer images, or choose another place"
        )


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder, 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _removed(folder: Path, worthless: Collection[str]) -> bool:
    """Empty the folder if it holds nothing but worthless files; returns whether it is empty, or gone, now."""
    if not folder.is_dir():
        return True
    files = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    if any(path.relative_to(folder).as_posix() not in worthless for path in files):
        return False
    empty_folder(folder)
    return True


def _remedy(error: BaseException | None) -> str | None:
    """What helps if an error, or one that it came from, is of the system taking no more; none if it is another.

    A library's own error of permissions may be about a file that is read: those count where we wrote.
    """
    wrote = False
    while error is not None:
        wrote = wrote or isinstance(error, OutputError)
        if isinstance(error, OSError) and error.errno in _REMEDIES:
            return _REMEDIES[error.errno]
        if isinstance(error, OSError) and error.errno in _NOT_ALLOWED and wrote:
            return _REMEDIES[errno.EROFS]
        error = error.__cause__
    return None
