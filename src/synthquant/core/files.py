"""Files that are either wholly there or not there at all, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from synthquant.core.errors import InputError, OutputError
from synthquant.core.locks import FORMER, claimed, temporary_file

SEAL = "sha256"
"""Field of a sealed JSON file that holds the hash of all others."""


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, reading it in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that a crash leaves either the old content or the new, never a mixture.

    Raises `OutputError` if it cannot be written.
    """
    try:
        with temporary_file(path) as (temporary, file):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if os.name == "nt":  # which renames no open file; elsewhere the open file says that it is no leftover
                file.close()
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys and a final newline, as `write_bytes` does: equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises `InputError` if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from error
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, or nested without end
        raise InputError(f"{path} is not a JSON file: {error}") from error


def write_sealed_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write fields as `write_json` does, with one more, `sha256`: the hash of all others."""
    write_json(path, {**fields, SEAL: _seal(fields)})


def read_sealed_json(path: Path, *, unsealed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the fields that `write_sealed_json` wrote, without the hash.

    Spaces and the order of fields may have changed, nothing else. `unsealed` are fields and values by which a file of
    an older format is known, which had no hash; a file of this format does not turn into one by losing its hash.

    Raises `InputError` if the file is missing, broken or not as it was written.
    """
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no fields; it is not what this package wrote")
    if SEAL not in fields:
        if unsealed and all(fields.get(name) == value for name, value in unsealed.items()):
            return fields
        raise InputError(f"{path} lacks the hash that this package writes: it is another file, or was changed since")
    found = fields.pop(SEAL)
    try:
        fits = found == _seal(fields)
    except ValueError:  # a number that is not finite, which is never written
        fits = False
    if not fits:
        raise changed(path)
    return fields


def changed(path: Path) -> InputError:
    """Return the error for a file whose content is not what its hash says."""
    return InputError(
        f"{path} was changed or damaged since it was written (its hash does not fit); restore it, or make it again"
    )


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder in a temporary one that becomes `path` on success and is removed on failure.

    An existing `path` that is not empty is only replaced if `replace` says so.
    Raises `OutputError` if it is in the way, the folder cannot be made, or another process is making `path`.
    """
    if path.is_dir():
        if not replace and any(path.iterdir()):
            raise OutputError(f"{path} already exists and is not empty; choose another folder or remove it")
    elif path.exists():
        raise OutputError(f"{path} is a file, not a folder; choose another name")
    with made_folder(path.parent), atomic_path(path) as temporary:
        make_folder(temporary)
        yield temporary


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder; what is made there becomes `path` on success.

    A file or folder that is already there is replaced. On failure nothing of it is left.
    Raises `OutputError` if the folder of `path` is not there or cannot be written, or another process is making `path`.
    """
    with claimed(path) as temporary:
        try:
            yield temporary / path.name
        except OutputError as error:  # say it of the path that was asked for
            raise OutputError(str(error).replace(str(temporary / path.name), str(path))) from error
        _swap(temporary / path.name, path, temporary / FORMER)


def make_folder(folder: Path) -> None:
    """Make a folder with its parents if it is not there; raises `OutputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make folder {folder}: {_reason(error)}") from error


def empty_folder(folder: Path) -> None:
    """Remove all that is in a folder, which may be reached through a link; links inside are not followed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder with its parents; on failure those that were made are removed again, as far as they are empty.

    Raises `OutputError` if it cannot be made.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        make_folder(folder)
        yield
    except BaseException:
        with suppress(OSError):
            for one in made:
                one.rmdir()
        raise


def require_writable(folder: Path) -> None:
    """Raise `OutputError` naming the path and the reason if files cannot be made in `folder`.

    A folder that does not exist yet is not made: the nearest existing parent is tried instead.
    """
    existing = folder
    while not existing.exists() and existing != existing.parent:
        if existing.is_symlink():
            raise OutputError(f"cannot write to {folder}: {existing} is a link to something that is not there")
        existing = existing.parent
    if not existing.is_dir():
        raise OutputError(f"cannot write to {folder}: {existing} is a file, not a folder")
    try:
        # Permission bits say too little (root, read-only mounts, quotas): try it, with a file that has no name.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {_reason(error)}") from error


def require_outside(out: Path, sources: Iterable[str | Path | None]) -> None:
    """Raise `OutputError` if `out` is one of the sources or lies inside one: the next who reads it would read both."""
    for source in sources:
        if source is None or not (path := Path(source).expanduser()).exists():
            continue
        if path.resolve() in (resolved := out.expanduser().resolve(), *resolved.parents):
            raise OutputError(f"{out} is, or lies inside, {source}, which is read; choose another --out")


def _swap(new: Path, path: Path, former: Path) -> None:
    """Let a file or folder take the place of what is at `path`, which goes to `former` for that time."""
    try:
        if path.is_dir() or (path.exists() and new.is_dir()):
            os.replace(path, former)
        try:
            os.replace(new, path)
        finally:  # a signal may strike here as well
            if former.exists() and not path.exists():
                os.replace(former, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}") from error


def _seal(fields: Mapping[str, Any]) -> str:
    """The hash of fields, whatever their order and the spaces between them."""
    as_read = json.loads(json.dumps(fields, allow_nan=False))  # keys that are numbers read back as texts
    return sha256_bytes(json.dumps(as_read, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def _sync_folder(folder: Path) -> None:
    # A rename is only safe against power loss once its folder is written; some systems cannot open folders.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
