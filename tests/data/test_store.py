from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.damage import Warned, same_or_refused

from synthquant.core.errors import DataError, OutputError
from synthquant.core.progress import ConsoleProgress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.store import ImageSetWriter

COUNT, BATCH = 22, 8


def _writer(folder: Path, **changes: Any) -> ImageSetWriter:
    arguments: dict[str, Any] = {
        "method": "noise",
        "settings": {"sizes": (1, 2), "rate": 0.1},
        "seed": 4,
        "model_fingerprint": "abc",
        "image_size": (6, 5),
        "target_count": COUNT,
    }
    return ImageSetWriter(folder, **{**arguments, **changes})


def _batch(number: int) -> torch.Tensor:
    size = min(BATCH, COUNT - number * BATCH)
    return torch.randn(size, 3, 6, 5, generator=Rng(0).generator(f"batch-{number}"))


def _append(writer: ImageSetWriter, number: int) -> None:
    images = _batch(number)
    writer.append(images, torch.full((len(images),), number), {"score": images.mean((1, 2, 3))})


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_batches_become_parts_and_a_set(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "set")
    for number in range(3):
        assert (writer.finished_parts, writer.finished_count) == (number, number * BATCH)
        _append(writer, number)
    image_set = writer.finish()
    image_set.verify()
    assert sorted(_bytes(tmp_path / "set")) == ["manifest.json", *(f"part-0000{i}.parquet" for i in range(3))]
    assert torch.equal(image_set[21].image, _batch(2)[5].half())
    assert image_set.labels is not None
    assert image_set.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 6
    manifest = image_set.manifest
    assert (manifest.method, manifest.seed, manifest.model_fingerprint) == ("noise", 4, "abc")
    assert manifest.settings == {"sizes": [1, 2], "rate": 0.1}
    assert (manifest.dtype, manifest.framing, manifest.image_size) == ("float16", "cropped", (6, 5))
    assert manifest.statistics is not None


def test_resumed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "whole")
    for number in range(3):
        _append(writer, number)
    writer.finish()
    for number in range(3):
        _append(_writer(tmp_path / "resumed"), number)
    _writer(tmp_path / "resumed").finish()
    assert _bytes(tmp_path / "resumed") == _bytes(tmp_path / "whole")


def test_leftovers_of_a_kill_do_no_harm(tmp_path: Path) -> None:
    # A half-written file, and a part that the journal does not know yet.
    writer = _writer(tmp_path / "whole")
    for number in range(3):
        _append(writer, number)
    writer.finish()
    folder = tmp_path / "killed"
    _append(_writer(folder), 0)
    (folder / ".part-00001.parquet.0123456789ab.tmp").write_bytes(b"half")
    (folder / "part-00001.parquet").write_bytes(b"not in the journal yet")
    writer = _writer(folder)
    assert writer.finished_parts == 1
    _append(writer, 1)
    _append(writer, 2)
    writer.finish()
    assert _bytes(folder) == _bytes(tmp_path / "whole")


_MAKE = """
import sys
from pathlib import Path
import torch
from synthquant.core.rng import Rng
from synthquant.data.store import ImageSetWriter

def make(folder, count):
    writer = ImageSetWriter(Path(folder), method="noise", settings={}, seed=0, model_fingerprint=None,
                            image_size=(64, 64), target_count=2 * count)
    for number in range(writer.finished_parts, count):
        writer.append(torch.randn(2, 3, 64, 64, generator=Rng(0).generator(f"batch-{number}")))
        print(number, flush=True)
    writer.finish()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_process_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{_MAKE}\nmake(sys.argv[1], 60)", str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        for _ in range(5):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/manifest.json").exists()
    scope: dict[str, Any] = {}
    exec(_MAKE, scope)
    for folder in ("killed", "whole"):
        scope["make"](tmp_path / folder, 60)
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")


def test_a_finished_set_is_kept(tmp_path: Path) -> None:
    for number in range(3):
        _append(_writer(tmp_path / "set"), number)
    _writer(tmp_path / "set").finish()
    before = _bytes(tmp_path / "set")
    writer = _writer(tmp_path / "set")
    assert (writer.finished_parts, writer.finished_count) == (3, COUNT)
    assert len(writer.finish()) == COUNT
    assert _bytes(tmp_path / "set") == before
    with pytest.raises(DataError, match="8 images more than the 22 promised"):
        _append(writer, 0)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "zeroq"}, "holds other images .method is 'noise' there, 'zeroq' now"),
        ({"settings": {"rate": 0.2}}, "settings.rate is 0.1 there, 0.2 now"),
        ({"seed": 5}, "seed is 4 there, 5 now"),
        ({"model_fingerprint": "abd"}, "model_fingerprint is 'abc' there, 'abd' now"),
        ({"target_count": 30}, "count is 22 there, 30 now"),
        ({"image_size": (5, 5)}, "image_size is "),
        ({"dtype": "uint8"}, "dtype is 'float16' there, 'uint8' now"),
        (
            {"seed": 5, "model_fingerprint": "abd", "settings": {"sizes": [1, 2], "rate": 0.2}, "target_count": 30},
            "model_fingerprint is .*; count is 22 there, 30 now; settings.rate is .*; and 1 more",
        ),
    ],
)
def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str, finished: bool
) -> None:
    for number in range(3):
        _append(_writer(tmp_path), number)
    if finished:
        _writer(tmp_path).finish()
    before = _bytes(tmp_path)
    with pytest.raises(DataError, match=f"{message}.*choose another folder or remove it"):
        _writer(tmp_path, **change)
    assert _bytes(tmp_path) == before


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("spoilt", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_damaged_parts_are_made_again_and_the_others_stay(
    tmp_path: Path, spoilt: tuple[int, ...], finished: bool
) -> None:
    for folder in (tmp_path / "whole", tmp_path / "set"):
        for number in range(3):
            _append(_writer(folder), number)
    _writer(tmp_path / "whole").finish()
    if finished:
        _writer(tmp_path / "set").finish()
    paths = [tmp_path / f"set/part-0000{number}.parquet" for number in range(3)]
    for number in spoilt:
        data = paths[number].read_bytes()
        paths[number].write_bytes(data[:600] + b"?" + data[601:])
    if len(spoilt) == 3:
        paths[0].unlink()
    written = [path.stat().st_mtime_ns for path in paths if path.exists()]
    progress = Warned()
    writer = _writer(tmp_path / "set", progress=progress)
    assert progress.warnings == [
        f"{paths[number]} is missing or not as it was written; it is made again" for number in spoilt
    ]
    assert writer.missing_parts(3) == list(spoilt)
    assert (writer.finished_parts, writer.finished_count) == (
        3 - len(spoilt),
        COUNT - sum(len(_batch(n)) for n in spoilt),
    )
    images = writer.written()
    assert (0 if images is None else len(images)) == writer.finished_count
    with pytest.raises(DataError, match="not a finished image set"):
        ImageSet.open(tmp_path / "set")
    for number in spoilt:  # killed after each: what is missing is found again
        writer = _writer(tmp_path / "set")
        assert writer.missing_parts(3)[0] == number
        _append(writer, number)
    _writer(tmp_path / "set").finish()
    assert _bytes(tmp_path / "set") == _bytes(tmp_path / "whole")
    kept = [path.stat().st_mtime_ns for number, path in enumerate(paths) if number not in spoilt]
    assert set(kept) <= set(written)


def test_a_journal_that_is_not_as_it_was_written_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        _append(_writer(tmp_path), number)
    journal = tmp_path / "parts.json"
    assert same_or_refused(journal, lambda: _writer(tmp_path).finished_count, flips=150) > 140
    journal.write_text('{"half": ')
    with pytest.raises(DataError, match=r"parts\.json is not a JSON file.*choose another folder or remove"):
        _writer(tmp_path)


def test_an_unfinished_set_cannot_be_opened_as_a_set(tmp_path: Path) -> None:
    writer = _writer(tmp_path)
    _append(writer, 0)
    with pytest.raises(DataError, match="is not a finished image set"):
        ImageSet.open(tmp_path)
    with pytest.raises(DataError, match="has 8 of 22 images"):
        writer.finish()


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="is not empty and holds no image set"):
        _writer(tmp_path)
    with pytest.raises(OutputError, match="is a file, not a folder"):
        _writer(tmp_path / "thesis.tex")
    assert _bytes(tmp_path) == {"thesis.tex": b"mine"}


def test_wrong_appends_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs at least 1 image, 0 were asked for"):
        _writer(tmp_path / "none", target_count=0)
    writer = _writer(tmp_path / "set")
    with pytest.raises(DataError, match=r"images are \(5, 6\) high and wide, not \(6, 5\)"):
        writer.append(torch.zeros(2, 3, 5, 6))
    with pytest.raises(DataError, match="23 images more than the 22 promised"):
        writer.append(torch.zeros(23, 3, 6, 5))
    writer.append(torch.zeros(2, 3, 6, 5), columns={"a": [1, 2]})
    with pytest.raises(DataError, match="columns differ from those of the parts before: label int64, a string after"):
        writer.append(torch.zeros(2, 3, 6, 5), columns={"a": ["x", "y"]})
    with pytest.raises(DataError, match="column 'a' cannot be stored"):
        writer.append(torch.zeros(2, 3, 6, 5), columns={"a": [1, "y"]})
    with pytest.raises(DataError, match="columns differ"):
        _writer(tmp_path / "set").append(torch.zeros(2, 3, 6, 5))
    assert writer.finished_count == 2


def test_suspicious_images_are_reported(tmp_path: Path) -> None:
    images = torch.randn(6, 3, 6, 5, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 2.9)
    images[0], images[1], images[3, 0, 0, 0] = 0, 0.4, float("nan")
    images[5] = images[2]
    writer = _writer(tmp_path, target_count=6)
    writer.append(images)
    stream = io.StringIO()
    quality = writer.finish(ConsoleProgress(stream)).manifest.quality
    assert quality["black"] == [0]
    assert quality["constant"] == [1]
    assert quality["nan"] == [3]
    assert quality["duplicate"] == [5]
    assert stream.getvalue().count("warning: ") == 4
    assert "1 of 6 images are not finite (NaN or infinity): 3" in stream.getvalue()


def test_uint8_sets(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (22, 3, 6, 5), dtype=torch.uint8)
    writer = _writer(tmp_path, dtype="uint8")
    writer.append(images[:20])
    writer.append(images[20:].float() / 255)
    image_set = writer.finish()
    assert torch.equal(torch.stack([image_set[i].image for i in range(22)]), images)
