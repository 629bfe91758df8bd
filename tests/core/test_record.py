from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from synthquant.cli.output import accuracy_rows, print_run
from synthquant.core.allocator import ALLOCATOR
from synthquant.core.errors import InputError
from synthquant.core.files import write_json, write_sealed_json
from synthquant.core.record import RunRecord, StageRecord, environment, peak_memory_bytes, reset_peak_memory
from synthquant.core.run_metrics import EvaluateMetrics


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
    write_sealed_json(path, {"version": 3})
    with pytest.raises(InputError, match="has format version 3, this release reads 2"):
        RunRecord.load(path)
    write_sealed_json(path, {"version": 2, "speed": 3})
    with pytest.raises(InputError, match="is not the record of a run: speed: "):
        RunRecord.load(path)
    write_json(path, {"version": 2})
    with pytest.raises(InputError, match="lacks the hash"):
        RunRecord.load(path)
    with pytest.raises(InputError, match="cannot read"):
        RunRecord.load(tmp_path / "none.json")


def whole_record() -> RunRecord:
    """A record of a finished run, with a value of every kind."""
    rows = [
        {"name": "float", "top1": 0.9, "interval": [0.8, 0.95]},
        {"name": "W4A4", "top1": 0.8, "agreement": 0.9, "kl": 0.1, "recovery": 1.1, "size_bytes": 10},
    ]
    unit = {"name": "fc", "loss_start": 1.0, "undecided": 0.1, "diverged": False, "steps": [0, 1], "losses": [1.0, 0.5]}
    layer = {"name": "fc", "kind": "Linear", "weight_bits": 4, "input_bits": None, "parameters": 4, "reason": "why"}
    totals = {"layers": 2, "quantized_layers": 1, "weights": 0.5, "multiply_adds": 0.5, "floating": {"fc": 0.5}}
    metrics = {
        "model": {"name": "net", "fingerprint": "f", "num_classes": 3, "class_names": ["a"], "preprocess": {}},
        "images": {"method": "noise", "count": 4},
        "select": {"pool": 4, "count": 2, "fingerprint": "f", "filters": [{"method": "e", "entered": 4, "kept": 2}]},
        "quantize": {
            "method": "rtn",
            "scheme": "W4A4",
            "units": [unit],
            "coverage": [layer],
            "coverage_summary": totals,
        },
        "evaluate": {"count": 4, "accuracy": rows, "sqnr": [{"name": "fc", "alone": 3.0}], "set_aside": []},
    }
    stages = {name: StageRecord(status="done", seconds=1.0, metrics=values) for name, values in metrics.items()}
    return RunRecord(stages=stages, recipe={"images": {"source": "here"}})


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested JSON values."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths(inner, (*path, key))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = with_value(value[path[0]], path[1:], new)
    return changed


def test_whatever_is_edited_in_a_record_without_a_hash_is_refused_in_one_line_or_can_be_shown(tmp_path: Path) -> None:
    path, fields = tmp_path / "run.json", whole_record().model_dump(mode="json") | {"version": 1}
    write_json(path, fields)
    assert RunRecord.load(path) == whole_record()
    refused = 0
    for place in paths(fields):
        for new in (None, "text", -1, 1.5, [], {}, [3], True):
            path.write_text(json.dumps(with_value(fields, place, new)))
            try:
                record = RunRecord.load(path)
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                refused += 1
                continue
            for row in (record.metrics("evaluate", EvaluateMetrics).accuracy or ())[1:]:
                assert row.top1 is None or 0 <= row.top1 <= 1
            assert record.image_source is None or isinstance(record.image_source, str)
            if all(name in record.stages and record.stages[name].status == "done" for name in ("quantize", "evaluate")):
                accuracy_rows(record)
                print_run(tmp_path, record, as_json=False)
                print_run(tmp_path, record, as_json=True)
    assert refused > 300


def test_a_stage_that_is_done_has_what_such_a_stage_measures(tmp_path: Path) -> None:
    path, fields = tmp_path / "run.json", whole_record().model_dump(mode="json") | {"version": 1}
    for stage, key in (("evaluate", "accuracy"), ("quantize", "scheme"), ("images", "count"), ("model", "fingerprint")):
        del (spoilt := json.loads(json.dumps(fields)))["stages"][stage]["metrics"][key]
        write_json(path, spoilt)
        with pytest.raises(InputError, match=rf"run\.json: stages\.{stage}\.metrics\.{key} is missing"):
            RunRecord.load(path)
        spoilt["stages"][stage]["status"] = "failed"
        write_json(path, spoilt)
        RunRecord.load(path)
    write_json(path, fields | {"stages": {"party": {}}})
    with pytest.raises(InputError, match="there is no stage 'party'"):
        RunRecord.load(path)


def test_environment_names_versions_and_hardware() -> None:
    found = environment()
    assert found["torch"] == torch.__version__
    assert found["device"] == "cpu"
    assert found["threads"] == str(torch.get_num_threads())
    assert found["allocator"] == ALLOCATOR.state
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
