"""From a run to a verified file, or to one line and no file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.small_networks import calibrated_model, small_float_model, small_images

from synthquant.core.errors import DataError, ModelError, OutputError, VerificationError
from synthquant.core.files import sha256_file
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import Checkpoint, save_checkpoint
from synthquant.export.write import export_run
from synthquant.nn.quant_model import QuantModel


class TextFile(Settings):
    """An exporter that writes a line."""

    promise: bool = True
    """Whether verification passes."""

    def export(self, quant_model: QuantModel, path: Path, *, origin: Mapping[str, str] | None = None) -> Path:
        path.write_text(f"{quant_model.scheme.name} {dict(origin or {})}")
        return path

    def verify(
        self, quant_model: QuantModel, path: Path, images: ImageSet, *, progress: Progress = QUIET
    ) -> dict[str, Any]:
        if not self.promise:
            raise VerificationError("it is not what was promised")
        return {"images": len(images)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(calibrated_model(small_float_model(tmp_path)), tmp_path / "run" / "model")


@pytest.fixture
def data(tmp_path: Path) -> str:
    small_images().save(tmp_path / "data")
    return str(tmp_path / "data")


def test_a_file_is_written_with_its_origin(checkpoint: Path, data: str, tmp_path: Path) -> None:
    (checkpoint.parent / "recipe.yaml").write_text("version: 1\n")
    found = export_run(checkpoint.parent, TextFile(), tmp_path / "file.txt", data=data, trust_code=True)
    text = (tmp_path / "file.txt").read_text()
    assert text.startswith("W4A4") and sha256_file(checkpoint.parent / "recipe.yaml") in text
    read = {"set_aside_count": 0, "set_aside": [], "changed": {}}
    assert found["bytes"] == len(text) and found["verification"] == {"images": 12} | read
    assert found["settings"] == {"promise": True}
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_is_exported_without_images_if_told_so(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not say which images it was made with: give --data, or --no-verify"):
        export_run(checkpoint, TextFile(), tmp_path / "file.txt", trust_code=True)
    assert (
        export_run(checkpoint, TextFile(), tmp_path / "file.txt", verify=False, trust_code=True)["verification"] is None
    )


def test_a_failed_verification_leaves_what_was_there(checkpoint: Path, data: str, tmp_path: Path) -> None:
    out = tmp_path / "file.txt"
    out.write_text("before")
    with pytest.raises(VerificationError, match="not what was promised"):
        export_run(checkpoint, TextFile(promise=False), out, data=data, trust_code=True)
    assert out.read_text() == "before" and not list(tmp_path.glob(".*"))


def test_wrong_folders_are_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not the folder of a run or a checkpoint"):
        export_run(tmp_path / "none", TextFile(), tmp_path / "file.txt", verify=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds no quantized network: .* finish that run"):
        export_run(tmp_path / "empty", TextFile(), tmp_path / "file.txt", verify=False)
    (tmp_path / "text").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        export_run(checkpoint, TextFile(), tmp_path / "text" / "file.txt", verify=False, trust_code=True)


def test_a_checkpoint_is_an_export_too_and_bit_identical(checkpoint: Path, data: str, tmp_path: Path) -> None:
    found = export_run(checkpoint, Checkpoint(), tmp_path / "copy", data=data, trust_code=True)
    assert found["verification"]["loaded"]["max_error"] == 0
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "README.md",
        "model.safetensors",
        "quant_config.json",
    ]


def test_a_checkpoint_of_another_network_is_found_out(checkpoint: Path, tmp_path: Path) -> None:
    other = calibrated_model(small_float_model(tmp_path, "build_other"))
    with pytest.raises(VerificationError, match="gives other logits"):
        Checkpoint().verify(other, checkpoint, small_images())
