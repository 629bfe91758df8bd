"""A folder while it is filled: what an error leaves there, and what a full disk is told as."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from synthquant.core import files
from synthquant.core.errors import DataError, OutputError
from synthquant.core.files import write_bytes, write_text
from synthquant.core.working_folder import require_space, working_folder

WORTHLESS = ("run.json", "images/parts.json")


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_takes_away_what_was_made_for_it_with_its_parents(tmp_path: Path) -> None:
    with pytest.raises(DataError), working_folder(tmp_path / "a" / "b", WORTHLESS):
        (tmp_path / "a" / "b" / "images").mkdir()
        (tmp_path / "a" / "b" / "images" / "parts.json").touch()
        (tmp_path / "a" / "b" / "run.json").touch()
        raise DataError("no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "made", ["model/model.safetensors", "work/weights/unit-0000.safetensors", "images/run.json", "x"]
)
def test_an_error_leaves_every_file_that_may_be_of_value(tmp_path: Path, made: str) -> None:
    with pytest.raises(DataError), working_folder(tmp_path / "run", WORTHLESS):
        write_text(tmp_path / "run" / "run.json", "")
        (tmp_path / "run" / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / made).touch()
        raise DataError("no")
    assert (tmp_path / "run" / "run.json").exists() and (tmp_path / "run" / made).exists()


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "run.json").touch()
    with pytest.raises(DataError), working_folder(tmp_path, WORTHLESS):
        raise DataError("no")
    assert (tmp_path / "run.json").exists()


def test_an_empty_folder_of_the_user_stays(tmp_path: Path) -> None:
    with pytest.raises(DataError), working_folder(tmp_path, WORTHLESS):
        (tmp_path / "run.json").touch()
        raise DataError("no")
    assert tmp_path.is_dir() and not any(tmp_path.iterdir())


def test_an_interrupt_leaves_what_there_is_and_no_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), working_folder(tmp_path / "a", WORTHLESS):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), working_folder(tmp_path / "b", WORTHLESS):
        (tmp_path / "b" / "run.json").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_full_disk_names_what_stays_and_that_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with pytest.raises(OutputError) as told, working_folder(run, WORTHLESS):
        (run / "images").mkdir()
        write_bytes(run / "images" / "part-0", b"image")
        with working_folder(run / "selected", ()):
            monkeypatch.setattr(files.os, "fsync", disk_full)
            write_bytes(run / "selected" / "part-0", b"image")
    assert str(told.value) == (
        f"cannot write {run / 'selected' / 'part-0'}: No space left on device; what is finished stays in {run}: "
        "make room and give the same command again to go on from there"
    )
    assert sorted(path.name for path in run.rglob("*")) == ["images", "part-0"]


def test_a_full_disk_that_another_library_met_is_told_too_and_nothing_kept_is_not_said_to_be(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=rf"cannot write in {tmp_path}/a: No space left on device$"),
        working_folder(tmp_path / "a", WORTHLESS),
    ):
        disk_full()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "make it writable"),
        (errno.EROFS, "make it writable"),
        (errno.EFBIG, "raise the limit of a file's size"),
    ],
)
def test_what_else_keeps_us_from_writing_says_what_stays_and_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "no")

    with pytest.raises(OutputError) as told, working_folder(tmp_path / "run", ()):
        write_text(tmp_path / "run" / "unit", "")
        monkeypatch.setattr(files.os, "fsync", refuse)
        write_text(tmp_path / "run" / "next", "")
    assert str(told.value).endswith(
        f"what is finished stays in {tmp_path / 'run'}: {remedy} and give the same command again to go on from there"
    )


def test_a_folder_that_was_removed_meanwhile_hides_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(OutputError, match=r"cannot write .*unit: No such file"), working_folder(run, WORTHLESS):
        run.rmdir()
        write_text(run / "unit", "")
    with pytest.raises(DataError), working_folder(run, WORTHLESS):
        run.rmdir()
        raise DataError("no")


def test_what_may_not_be_read_is_not_said_to_be_unwritable(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="secret"), working_folder(tmp_path, ()):
        raise PermissionError(errno.EACCES, "Permission denied", "secret")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_before_anything_is_made_leaves_no_folder(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)), working_folder(tmp_path / "run", WORTHLESS):
        (tmp_path / "run" / "run.json").touch()
        raise error
    assert not any(tmp_path.iterdir())


def test_space_is_asked_for_before_the_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path / "not" / "yet", {"images": free // 4})
    with pytest.raises(OutputError, match=r"run needs about .* \(images .* GiB, work .*\) but its disk has"):
        require_space(tmp_path / "run", {"images": 2 * free, "work": 2**20, "nothing": 0})
