from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthquant.core.errors import InputError, OutputError
from synthquant.core.run_folder import RunFolder

RECIPE = {
    "model": {"source": "m"},
    "images": {"count": 4},
    "evaluate": None,
    "device": "cpu",
    "memory": {"host_gib": 1},
}


def opened(path: Path, **changes: object) -> RunFolder:
    return RunFolder(path, RECIPE | changes, device="cpu", seed=3, place=("device", "memory.host_gib"))


MEASURED = {
    "model": {"name": "m", "fingerprint": "f"},
    "images": {"method": "noise", "count": 4},
    "evaluate": {"count": 4, "accuracy": [{"name": "float"}, {"name": "W4A4"}]},
}


def finish(folder: RunFolder, *stages: str) -> None:
    folder.path.mkdir(parents=True, exist_ok=True)
    for name in stages:
        with folder.stage(name) as metrics:
            metrics |= MEASURED[name]


def test_opening_writes_nothing(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_stage_is_running_while_it_runs_and_done_with_its_metrics_afterwards(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with folder.stage("images") as metrics:
        assert json.loads((tmp_path / "run.json").read_text())["stages"]["images"]["status"] == "running"
        metrics |= MEASURED["images"]
    stage = opened(tmp_path).record.stages["images"]
    assert (stage.status, stage.metrics) == ("done", MEASURED["images"])
    assert stage.seconds > 0
    assert opened(tmp_path).is_done("images") and not opened(tmp_path).is_done("images", "report")


def test_a_stage_that_raises_has_failed_and_its_time_counts_on_when_it_is_done_later(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with pytest.raises(ZeroDivisionError), folder.stage("images"):
        raise ZeroDivisionError
    failed = opened(tmp_path).record.stages["images"]
    assert failed.status == "failed" and failed.seconds > 0
    again = opened(tmp_path)
    finish(again, "images")
    assert again.record.stages["images"].seconds > failed.seconds


def test_a_folder_of_another_recipe_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    finish(opened(tmp_path), "model", "images")
    with pytest.raises(InputError, match=r"images\.count is 4 there, 5 now"):
        opened(tmp_path, images={"count": 5})
    with pytest.raises(InputError, match=r"model\.source is 'm' there, 'n' now"):
        opened(tmp_path, model={"source": "n"})


def test_where_a_run_is_computed_may_change(tmp_path: Path) -> None:
    finish(opened(tmp_path), "model", "images")
    assert opened(tmp_path, device="cuda", memory={"host_gib": 9}).is_done("images")


def test_a_section_may_change_until_its_stage_begins(tmp_path: Path) -> None:
    finish(opened(tmp_path), "model", "images")
    changed = opened(tmp_path, evaluate={"data": "x"})
    assert changed.record.recipe["evaluate"] == {"data": "x"}
    finish(changed, "evaluate")
    with pytest.raises(InputError, match="evaluate"):
        opened(tmp_path)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(OutputError, match="is not empty and not a run folder"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["images", "selected", "model", "work"])
def test_what_is_in_the_way_of_a_folder_is_said_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=rf"{name} is in the way: a run has a folder there; move it away"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["report.html", "recipe.yaml", "run.json"])
def test_what_is_in_the_way_of_a_file_is_said_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match=rf"{name} is in the way: a run has a file there; move it away"):
        opened(tmp_path)


def test_a_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        opened(tmp_path / "file" / "run")
