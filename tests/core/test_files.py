from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from synthquant.core import files
from synthquant.core.errors import InputError, OutputError
from synthquant.core.files import (
    atomic_folder,
    read_json,
    read_sealed_json,
    require_writable,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_json,
    write_sealed_json,
    write_text,
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert _names(tmp_path) == ["a.bin"]


def test_a_crash_before_the_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(OutputError, match=r"cannot write .*a\.txt: No space left on device"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["a.txt"]


def test_writing_into_a_missing_folder_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=re.escape(f"cannot write {tmp_path / 'no' / 'a'}: No such file or directory")
    ):
        write_bytes(tmp_path / "no" / "a", b"")


FIELDS = {"version": 2, "share": 0.1, "names": ["a", "ü"], "by_label": {"10": 1, "9": None}}


def test_sealed_json_reads_back_whatever_its_spaces(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed_json(path, {**FIELDS, "by_label": {10: 1, 9: None}})
    assert read_sealed_json(path) == FIELDS
    write_text(path, " ".join(path.read_text().split()))
    assert read_sealed_json(path) == FIELDS


def test_every_change_of_sealed_json_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_sealed_json(path, FIELDS)
    data = path.read_bytes()
    spoilt = [data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :] for at in range(len(data)) for bit in (1, 64)]
    refused = 0
    for content in [*spoilt, *(data[:end] for end in range(len(data) - 1)), b"1" * 5000, b"[" * 10**5, b"[]"]:
        path.write_bytes(content)
        try:
            assert read_sealed_json(path, unsealed={"version": 1}) == FIELDS, content
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.9 * len(spoilt)


def test_a_file_older_than_the_hash_is_read_where_its_version_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"version": 1})
    assert read_sealed_json(path, unsealed={"version": 1}) == {"version": 1}
    with pytest.raises(InputError, match=r"a\.json lacks the hash that this package writes"):
        read_sealed_json(path)
    write_json(path, {"version": 1, "sha256": "0" * 64})
    with pytest.raises(InputError, match=r"a\.json was changed or damaged .* \(its hash does not fit\); restore it"):
        read_sealed_json(path, unsealed={"version": 1})
    write_json(path, {"version": 2})
    with pytest.raises(InputError, match="lacks the hash"):
        read_sealed_json(path, unsealed={"version": 1})


def test_json_is_sorted_ends_in_a_newline_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [0.1]})
    assert path.read_text() == '{\n  "a": [\n    0.1\n  ],\n  "b": 1\n}\n'
    assert read_json(path) == {"a": [0.1], "b": 1}


def test_broken_or_missing_json_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"half\.json is not a JSON file"):
        read_json(tmp_path / "half.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.json is not a JSON file"):
        read_json(tmp_path / "binary.json")


def test_hashes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert _names(target) == ["a"]
    assert _names(target.parent) == ["model"]


def test_folder_vanishes_on_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt
    assert _names(tmp_path) == []


def test_what_cannot_be_written_is_said_of_the_path_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError) as told, atomic_folder(tmp_path / "model") as folder:
        write_text(folder / "a", "1")
    assert str(told.value) == f"cannot write {tmp_path / 'model' / 'a'}: No space left on device"
    assert _names(tmp_path) == []


def test_folder_in_the_way_is_kept_unless_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(OutputError, match="already exists and is not empty"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, replace=True) as folder:
        raise RuntimeError
    assert _names(target) == ["old"]
    with atomic_folder(target, replace=True) as folder:
        (folder / "new").write_text("2")
    assert _names(target) == ["new"]
    assert _names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no")])
def test_what_stops_the_replacing_of_a_folder_half_way_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target, replace, calls = tmp_path / "model", os.replace, []
    target.mkdir()
    (target / "old").touch()

    def second_fails(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise error
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises((KeyboardInterrupt, OutputError)), atomic_folder(target, replace=True) as folder:
        (folder / "new").touch()
    assert _names(target) == ["old"] and _names(tmp_path) == ["model"]


def test_an_old_folder_that_cannot_be_put_back_at_once_is_put_back_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace, calls = tmp_path / "model", os.replace, []
    target.mkdir()
    (target / "old").touch()

    def only_first(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) > 1:
            raise OSError("no")
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", only_first)
        with pytest.raises(OutputError), atomic_folder(target, replace=True):
            pass
    with pytest.raises(RuntimeError), atomic_folder(target, replace=True):
        raise RuntimeError
    assert _names(target) == ["old"] and _names(tmp_path) == ["model"]


def test_empty_folder_is_not_in_the_way(tmp_path: Path) -> None:
    with atomic_folder(tmp_path) as folder:
        (folder / "a").write_text("1")
    assert _names(tmp_path) == ["a"]


def test_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(OutputError, match="is a file, not a folder"), atomic_folder(tmp_path / "model"):
        pass
    with pytest.raises(OutputError, match="cannot make folder"), atomic_folder(tmp_path / "model" / "inner"):
        pass


def test_require_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_writable(tmp_path / "not" / "yet")
    assert _names(tmp_path) == []
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "link", tmp_path / "link" / "inner"):
        with pytest.raises(OutputError, match=r"link is a link to something that is not there"):
            require_writable(path)
    (tmp_path / "link").unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to .*out: .*file is a file, not a folder"):
        require_writable(tmp_path / "file" / "out")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match=rf"cannot write to {re.escape(str(tmp_path))}: Permission denied"):
        require_writable(tmp_path)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that nobody can write to")
def test_require_writable_notices_what_permission_bits_do_not_say() -> None:
    with pytest.raises(OutputError, match="cannot write to /proc/out: "):
        require_writable(Path("/proc/out"))
