"""Locks of the operating system, and what is taken for the leftover of a killed process."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from synthquant.core import locks
from synthquant.core.errors import OutputError
from synthquant.core.files import atomic_folder, atomic_path, write_text
from synthquant.core.locks import claimed, locked_folder, remove_leftovers, temporary_file

MAKE = {"folder": locked_folder, "claim": claimed, "file": temporary_file}


@contextmanager
def holding(kind: str, path: Path) -> Iterator[int]:
    """Another process that holds a lock, killed (SIGKILL) at the end."""
    ready, tell = os.pipe()
    process = os.fork()
    if process == 0:
        with MAKE[kind](path) as made:
            if kind == "claim":
                (made / path.name).write_text("half")
            os.write(tell, b"ready")
            time.sleep(600)
        os._exit(0)
    os.close(tell)
    try:
        assert os.read(ready, 5) == b"ready"
        yield process
    finally:
        os.close(ready)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def command_line() -> str:
    return " ".join(Path("/proc/self/cmdline").read_text().split("\0")).strip()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_process_is_told_who_works_on_a_folder_until_that_one_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holding("folder", run) as process:
        with pytest.raises(OutputError) as refused, locked_folder(run):
            pass
        assert f"{run} is being written by process {process} ({command_line()[:100]}" in str(refused.value)
        assert str(refused.value).endswith("; wait until it is done, stop it, or choose another place")
    with locked_folder(run):
        assert names(run) == []


def test_one_process_makes_a_file_or_folder_and_what_it_leaves_when_killed_is_removed(tmp_path: Path) -> None:
    with holding("claim", tmp_path / "net.onnx") as process:
        for make in (atomic_path, atomic_folder):
            with (
                pytest.raises(OutputError, match=rf"net\.onnx is being written by process {process} "),
                make(tmp_path / "net.onnx"),
            ):
                pass
        write_text(tmp_path / "other.onnx", "")
        assert len(names(tmp_path)) == 2  # and nothing of it was taken for a leftover
    with atomic_path(tmp_path / "other.onnx") as path:
        path.write_text("new")
    assert len(names(tmp_path)) == 2  # a leftover of another name is for the next command of that name
    with atomic_path(tmp_path / "net.onnx") as path:
        path.write_text("new")
    assert names(tmp_path) == ["net.onnx", "other.onnx"]


def test_files_half_written_go_when_the_name_is_written_again(tmp_path: Path) -> None:
    with holding("file", tmp_path / "run.json"):
        write_text(tmp_path / "run.json", "mine")
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 2
    write_text(tmp_path / "other", "")
    assert len(names(tmp_path)) == 3
    write_text(tmp_path / "run.json", "mine")
    assert names(tmp_path) == ["other", "run.json"]


def test_only_names_of_our_own_are_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    kept = [".notes.tmp", ".a.0123456789ab.tmp.txt", "a.0123456789ab.tmp", ".a.0123456789AB.tmp"]
    (tmp_path / "inside").mkdir()
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / ".link.0123456789ab.tmp").symlink_to(tmp_path / "inside")
    (tmp_path / ".a.0123456789ab.tmp").touch()
    (tmp_path / "inside" / ".b.0123456789ab.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*kept, "inside", ".link.0123456789ab.tmp"])
    assert names(tmp_path / "inside") == [".b.0123456789ab.tmp"]
    remove_leftovers(tmp_path, deep=True)
    assert names(tmp_path / "inside") == []


def test_what_was_put_aside_by_a_process_killed_before_the_new_was_there_comes_back(tmp_path: Path) -> None:
    for name in ("model", "page"):
        (tmp_path / f".{name}.0123456789ab.tmp" / locks.FORMER).mkdir(parents=True)
        (tmp_path / f".{name}.0123456789ab.tmp" / locks.FORMER / "old").touch()
    (tmp_path / "page").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model", "page"]
    assert names(tmp_path / "model") == ["old"] and names(tmp_path / "page") == []


def test_without_locks_nothing_is_refused_and_nothing_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".a.0123456789ab.tmp").touch()
    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with locked_folder(tmp_path), locked_folder(tmp_path), claimed(tmp_path / "a"), claimed(tmp_path / "a"):
        write_text(tmp_path / "a", "1")
    assert names(tmp_path) == [".a.0123456789ab.tmp", "a"]


def test_a_folder_removed_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, run = locks.fcntl.flock, tmp_path / "run"
    removed = []

    def late(handle: int, operation: int) -> None:
        if not removed:
            removed.append(run)
            run.rmdir()
        flock(handle, operation)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with locked_folder(run):
        assert removed and names(run) == []
        with pytest.raises(OutputError, match="is being written by"), locked_folder(run):
            pass
