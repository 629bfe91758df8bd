from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.cli.conftest import Command

from synthquant.core.files import sha256_file
from synthquant.data.image_set import ImageSet
from synthquant.methods import SELECTORS


@pytest.fixture
def network(model_options: list[str]) -> list[str]:
    """The small network as `select` takes it."""
    return ["--model", *model_options]


def everything(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_select_keeps_what_two_filters_keep_and_says_so(
    synthquant: Command, network: list[str], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "chosen"
    by = ["--by", "energy:0.5", "--by", "bn_sensitivity:4"]
    outcome = synthquant("select", data, *network, *by, "--out", out, "--batch-size", 8, "--device", "cpu")
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[:2] == ["energy                  11 of 21", "bn_sensitivity           4 of 11"]
    assert lines[2].startswith("distance to the batch norms: pool ") and lines[3] == f"4 of 21 images in {out}"
    assert "score images: 21/21" in outcome.err and "save chosen: 4/4" in outcome.err
    chosen = ImageSet.open(out)
    assert len(chosen) == 4
    assert [name.partition("@")[0] for name in chosen.column_names] == ["bn_sensitivity", "energy"]
    pool = ImageSet.open(data)
    pixels = {pool[index].image.numpy().tobytes(): pool[index].label for index in range(21)}
    assert all(pixels[chosen[index].image.numpy().tobytes()] == chosen[index].label for index in range(4))
    assert len(ImageSet.open(out / "rejected")) == 17


def test_json_is_all_there_is_on_standard_output(
    synthquant: Command, network: list[str], data: Path, tmp_path: Path
) -> None:
    outcome = synthquant("select", data, *network, "--by", "energy:5", "--out", tmp_path / "chosen", "--json")
    result = json.loads(outcome.out)
    assert (result["count"], result["pool"], result["rejected"]) == (5, 21, 16)
    assert result["bn_distance"] is None  # nothing read the batch norms
    assert result["filters"][0]["method"] == "energy" and result["filters"][0]["kept"] == 5
    assert result["fingerprint"] == ImageSet.open(tmp_path / "chosen").fingerprint


def test_the_same_command_again_reads_what_is_there_and_another_is_refused(
    synthquant: Command, network: list[str], data: Path, tmp_path: Path
) -> None:
    command = ["select", data, *network, "--by", "bn_sensitivity:0.5", "--out", tmp_path / "chosen"]
    first = synthquant(*command)
    before = everything(tmp_path / "chosen")
    again = synthquant(*command)
    assert again.status == 0 and again.out == first.out
    assert "this selection is finished" in again.err and "score images" not in again.err
    assert everything(tmp_path / "chosen") == before
    refused = synthquant(*command, "--set", "spread=std")
    assert "holds another selection (other filters); choose another --out" in refused.error
    assert everything(tmp_path / "chosen") == before


def test_a_killed_selection_leaves_nothing_and_ends_with_the_same_bytes(
    synthquant: Command, network: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    command = ["select", data, *network, "--by", "bn_sensitivity:0.5", "--by", "energy:0.5", "--out"]
    assert synthquant(*command, tmp_path / "whole").status == 0
    for place in ("write_sealed_json", "summarize"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(f"synthquant.select.write.{place}", die)
            synthquant(*command, tmp_path / "killed")
        assert not [path.name for path in tmp_path.iterdir() if "killed" in path.name]
    assert synthquant(*command, tmp_path / "killed").status == 0
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_per_class_and_settings_of_one_filter(
    synthquant: Command, network: list[str], data: Path, tmp_path: Path
) -> None:
    by = ["--by", "energy:2", "--by", "bn_sensitivity:1"]
    settings = ["--per-class", "--set", "energy.temperature=2.5", "--set", "bn_sensitivity.set_size=5"]
    settings += ["--set", "table_gib=0"]
    outcome = synthquant("select", data, *network, *by, *settings, "--out", tmp_path / "chosen")
    assert outcome.status == 0, outcome.err
    chosen = ImageSet.open(tmp_path / "chosen")
    assert chosen.labels is not None and torch.bincount(chosen.labels).tolist() == [1] * 7
    energy, sensitivity = json.loads((tmp_path / "chosen" / "selection.json").read_text())["steps"]
    assert energy["settings"] == {"keep": 2, "per_class": True, "temperature": 2.5}
    assert sensitivity["settings"]["set_size"] == 5 and sensitivity["settings"]["per_class"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by", "energi:0.5"], "unknown selection method 'energi'; did you mean 'energy'?"),
        (["--by", "energy:half"], "--by 'energy:half': write METHOD:KEEP with a share or a count"),
        (["--by", "energy:1.5"], "keep = 1.5: give a share above 0 and up to 1"),
        (["--by", "energy:0"], "keep = 0: give a share above 0 and up to 1"),
        (["--by", "energy:22"], "energy: 22 images are to stay but there are 21; keep fewer, make more"),
        (["--by", "energy:4", "--per-class"], "energy: 4 images of class 0 are to stay but there are 3"),
        (["--by", "energy:0.5", "--by", "bn_distance:12"], "bn_distance: 12 images are to stay but there are 11"),
        (["--by", "patch_similarity:3"], "which patch_similarity needs; use a filter that works for it: bn_distance"),
        (["--by", "energy:2", "--set", "temprature=2"], "did you mean 'select.by.0.temperature'?"),
        (["--by", "energy:2", "--set", "bn_distance.spread=std"], "no --by names 'bn_distance'"),
        (["--by", "energy:2", "--set", "temperature=0"], "temperature = 0"),
        (["--by", "energy:2", "--set", "table_gib=-1"], "select: table_gib = -1"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    synthquant: Command, network: list[str], data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    outcome = synthquant("select", data, *network, *arguments, "--out", tmp_path / "a" / "chosen")
    assert outcome.status == 1 and message in outcome.error
    assert not (tmp_path / "a").exists()


def test_wrong_places(synthquant: Command, network: list[str], data: Path, tmp_path: Path) -> None:
    by = ["--by", "energy:2"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").touch()
    assert "is not empty" in synthquant("select", data, *network, *by, "--out", tmp_path / "mine").error
    (tmp_path / "file").touch()
    assert (
        "is a file, not a folder" in synthquant("select", data, *network, *by, "--out", tmp_path / "file" / "x").error
    )
    assert "no images at" in synthquant("select", "./nothing.png", *network, *by, "--out", tmp_path / "x").error
    assert synthquant("select", data, *network, "--out", tmp_path / "x").status == 2  # no --by
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["holiday.jpg"] and not (tmp_path / "x").exists()


def test_list_and_show_know_the_filters(synthquant: Command) -> None:
    listed = json.loads(synthquant("list", "select", "--json").out)
    assert set(listed["select"]) == set(SELECTORS.names())
    for name in SELECTORS.names():
        shown = json.loads(synthquant("show", name, "--json").out)
        assert {"keep", "per_class"} <= {entry["name"] for entry in shown["settings"]}
        assert all(entry["description"] for entry in shown["settings"])


def test_select_takes_the_common_options(synthquant: Command) -> None:
    outcome = synthquant("select", "--help")
    options = ("--device", "--seed", "--set FIELD=VALUE", "--json", "--batch-size", "--per-class", "--by METHOD:KEEP")
    assert outcome.status == 0 and all(option in outcome.out for option in options)
