from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from synthquant.core.errors import InputError
from synthquant.core.files import write_json
from synthquant.core.record import RunRecord, StageRecord, environment, peak_memory_bytes, reset_peak_memory


def test_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    record = RunRecord(seed=7, recipe={"model": "zoo/x"}, environment=environment())
    stage = record.stage("quantize")
    stage.status = "running"
    stage.metrics["loss"] = 0.25
    assert record.stage("quantize") is stage
    record.save(tmp_path / "run.json")
    assert RunRecord.load(tmp_path / "run.json") == record


def test_records_do_not_share_their_defaults() -> None:
    StageRecord().metrics["x"] = 1
    assert StageRecord().metrics == {}


def test_status_is_checked() -> None:
    with pytest.raises(ValidationError):
        StageRecord().status = "almost"  # type: ignore[assignment]  # the point of the test


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"version": 2})
    with pytest.raises(InputError, match="has format version 2, this release reads version 1"):
        RunRecord.load(path)
    write_json(path, {"speed": 3})
    with pytest.raises(InputError, match="is not a run record"):
        RunRecord.load(path)
    with pytest.raises(InputError, match="cannot read"):
        RunRecord.load(tmp_path / "none.json")


def test_environment_names_versions_and_hardware() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["threads"] == str(torch.get_num_threads())
    assert all(found.values())


def test_peak_memory_grows_with_use() -> None:
    resettable = reset_peak_memory()
    before = peak_memory_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    after = peak_memory_bytes()
    assert block.sum() > 0
    if before is None or after is None:
        pytest.skip("this system does not say")
    assert after >= before
    if resettable:
        assert after - before > 32 * 2**20
