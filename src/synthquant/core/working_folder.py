"""A folder while one process fills it: locked, cleared of leftovers, and nothing of value lost whatever goes wrong."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from synthquant.core.errors import OutputError, SynthquantError
from synthquant.core.files import made_folder, require_writable
from synthquant.core.locks import locked_folder, remove_leftovers

# No space, over quota, over the limit of a file's size, a disk that became read-only, a failing disk.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class FullDiskError(OutputError):
    """The disk took no more; the message says what is kept."""


@contextmanager
def working_folder(folder: Path, worthless: Collection[str]) -> Iterator[None]:
    """Make `folder`, hold its lock, and if an error ends the work take it away again unless it holds anything of value.

    Args:
        folder: what is filled; if it held files before, none is removed but what killed processes left unfinished.
        worthless: files, relative to `folder`, that only say what was asked for. Any other file is kept.

    Raises:
        OutputError: the folder cannot be made or written, another process is writing it, or the disk is full; the
            message then says what is kept.
    """
    require_writable(folder)
    with made_folder(folder), locked_folder(folder):
        remove_leftovers(folder)
        is_new = not any(folder.iterdir())
        try:
            yield
        except OSError as error:
            kept = not is_new or not _removed(folder, worthless)
            if isinstance(error, FullDiskError) or not _is_disk_error(error):
                raise
            what = str(error) if isinstance(error, OutputError) else f"cannot write in {folder}: {error.strerror}"
            if not kept:  # in here; a folder around this one may say more
                raise OutputError(what) from error
            advice = "make room and give the same command again to go on from there"
            raise FullDiskError(f"{what}; what is finished stays in {folder}: {advice}") from error
        except SynthquantError:
            if is_new:
                _removed(folder, worthless)
            raise


def require_space(folder: Path, needed: Mapping[str, int]) -> None:
    """Raise `OutputError` if the disk of `folder` has less free space than the sum of `needed` [bytes by what for]."""
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    free, total = shutil.disk_usage(existing).free, sum(needed.values())
    if total > free:
        parts = ", ".join(f"{what} {_size(size)}" for what, size in needed.items() if size)
        raise OutputError(
            f"{folder} needs about {_size(total)} ({parts}) but its disk has {_size(free)} free; "
            "free some, ask for fewer images, or choose another place"
        )


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder, 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _removed(folder: Path, worthless: Collection[str]) -> bool:
    """Empty the folder if it holds nothing but worthless files; returns whether it is empty now."""
    files = [path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()]
    if any(path.relative_to(folder).as_posix() not in worthless for path in files):
        return False
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return True


def _is_disk_error(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is of a disk that takes no more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            return True
        error = error.__cause__
    return False


def _size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
