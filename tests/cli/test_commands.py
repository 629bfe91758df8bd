from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
from tests.cli.conftest import Command

from synthquant.core.record import RunRecord, environment
from synthquant.data.image_set import ImageSet
from synthquant.methods import QUANTIZERS, SELECTORS, SYNTHESIZERS
from synthquant.quantize import GenieM


def test_run_prints_float_beside_quantized_and_the_rule_for_the_ends(
    synthquant: Command, recipe: Path, tmp_path: Path
) -> None:
    outcome = synthquant("run", recipe, "--out", tmp_path / "run")
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith("W4A4 (weights 4 bit") and "first and last layer W8A8" in lines[0]
    assert lines[1].startswith("quantized: ") and lines[1].endswith("% of multiply-adds")
    headings = ["network", "top-1 %", "95% interval", "top-5 %", "recovery %", "agreement %", "KL [nats]", "size"]
    assert re.split(r" {2,}", lines[2]) == headings
    assert lines[3].startswith("float ") and lines[4].startswith("W4A4 ")
    assert str(tmp_path / "run" / "report.html") in lines[5]


def test_run_json_is_all_there_is_on_standard_output(synthquant: Command, recipe: Path, tmp_path: Path) -> None:
    outcome = synthquant("run", recipe, "--out", tmp_path / "run", "--json", "--seed", 5, "--set", "images.count=7")
    result = json.loads(outcome.out)
    assert [row["name"] for row in result["accuracy"]] == ["float", "W4A4"]
    assert result["out"] == str(tmp_path / "run")
    record = RunRecord.load(tmp_path / "run" / "run.json")
    assert record.seed == 5 and record.recipe["images"]["count"] == 7
    assert "evaluate float" in outcome.err


def test_synthesize_then_quantize_then_evaluate_then_report(
    synthquant: Command, model_options: list[str], data: Path, tmp_path: Path
) -> None:
    images, run, page = tmp_path / "images", tmp_path / "run", tmp_path / "page.html"
    small = ["--set", "iterations=2", "--set", "batch_size=4"]
    made = synthquant(
        "synthesize", *model_options, "--method", "zeroq", "--count", 6, "--out", images, *small, "--json"
    )
    made_json = json.loads(made.out)
    assert made_json["count"] == 6 == len(ImageSet.open(images))
    assert made_json["environment"] == environment("cpu")  # processor and threads change the last bits of images
    quantized = synthquant(
        "quantize", *model_options, "--images", images, "--scheme", "W8A8", "--method", "adaround", "--out", run,
        *small,
        "--set", "scheme.ends=same", "--data", data, "--device", "cpu",
    )  # fmt: skip
    assert quantized.status == 0, quantized.err
    assert "same bits in every layer" in quantized.out
    row = json.loads(synthquant("evaluate", run, "--trust-code", "--data", data, "--json", "--set", "batch_size=5").out)
    assert row.pop("environment") == environment("cpu")
    assert row["count"] == 21 and 0 <= row["top1"] <= row["top5"] <= 1 and row["agreement"] > 0.5 and row["seconds"] > 0
    assert synthquant("report", run, "--out", page).out.strip() == str(page)
    assert "<html" in page.read_text()


DETECTOR = """
from torch import nn

class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.boxes = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return {"boxes": self.boxes(self.stem(x).relu())}
"""


def test_a_network_that_is_no_classifier_is_named_by_its_task(
    synthquant: Command, model_options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "detector.py").write_text(DETECTOR)
    images, run = tmp_path / "images", tmp_path / "run"
    network = [f"{tmp_path / 'detector.py'}:Detector", *model_options[1:]]
    synthesize = ["synthesize", *network, "--method", "noise", "--count", 9, "--out", images]
    quantize = ["quantize", *network, "--images", images, "--method", "rtn", "--out", run]
    assert "returns a dict for 2 images, not logits" in synthquant(*synthesize).error
    assert synthquant(*synthesize, "--task", "other").status == 0
    assert "give --task other" in synthquant(*quantize).error
    done = synthquant(*quantize, "--task", "other")
    assert done.status == 0 and "SQNR [dB]" in done.out
    assert RunRecord.load(run / "run.json").recipe["model"]["task"] == "other"
    measured = synthquant("evaluate", run, "--trust-code", "--data", images)
    assert measured.status == 0 and "output boxes: " in measured.out and "top-1" not in measured.out


def test_stage_by_stage_gives_what_run_gives(
    synthquant: Command, recipe: Path, model_options: list[str], data: Path, tmp_path: Path
) -> None:
    synthquant("run", recipe, "--out", tmp_path / "run", "--seed", 4)
    images, run = tmp_path / "images", tmp_path / "run2"
    synthquant("synthesize", *model_options, "--method", "noise", "--count", 9, "--out", images, "--seed", 4)
    synthquant("quantize", *model_options, "--images", images, "--method", "rtn", "--out", run, "--seed", 4)
    for name in ("images/part-00000.parquet", "images/manifest.json", "model/model.safetensors"):
        other = images.parent / name if name.startswith("images") else run / name
        assert (tmp_path / "run" / name).read_bytes() == other.read_bytes()


def test_evaluate_measures_a_float_network(synthquant: Command, model_options: list[str], data: Path) -> None:
    row = json.loads(synthquant("evaluate", *model_options, "--data", data, "--json").out)
    assert row["count"] == 21 and row["agreement"] is None
    assert "top-1 %" in synthquant("evaluate", *model_options, "--data", data).out


def test_evaluate_refuses_images_without_labels_before_the_network_runs_on_them(
    synthquant: Command, model_options: list[str], tmp_path: Path
) -> None:
    images = tmp_path / "unlabelled"
    synthquant("synthesize", *model_options, "--method", "noise", "--count", 4, "--out", images)
    said = synthquant("evaluate", *model_options, "--data", images)
    assert f"{images} has no labels, and there is no float network to agree with" in said.error


def test_what_libraries_will_do_in_future_stays_off_the_terminal(
    synthquant: Command, model_options: list[str], data: Path
) -> None:
    with Path(model_options[0].rpartition(":")[0]).open("a", encoding="utf-8") as file:
        file.write("\nimport warnings\nwarnings.warn('this will go', FutureWarning)\nwarnings.warn('mine')\n")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert synthquant("evaluate", *model_options, "--data", data).status == 0
    assert [str(warning.message) for warning in seen] == ["mine"]


def test_quantize_without_data_measures_agreement(
    synthquant: Command, model_options: list[str], data: Path, tmp_path: Path
) -> None:
    outcome = synthquant(
        "quantize", *model_options, "--images", data, "--method", "rtn", "--out", tmp_path / "run", "--json"
    )
    _, after = json.loads(outcome.out)["accuracy"]
    assert after["top1"] is None and 0 <= after["agreement"] <= 1


def test_a_checkpoint_whose_float_network_is_gone_is_still_measured(
    synthquant: Command, model_options: list[str], data: Path, tmp_path: Path
) -> None:
    synthquant("quantize", *model_options, "--images", data, "--method", "rtn", "--out", tmp_path / "run")
    source = tmp_path / "small_network.py"
    source.write_text(source.read_text().replace("def build(seed=0)", "def build(seed=5)"))
    outcome = synthquant("evaluate", tmp_path / "run", "--trust-code", "--data", data, "--json")
    assert json.loads(outcome.out)["agreement"] is None
    assert "no agreement with the float network" in outcome.err


def test_list_names_every_method_and_every_bundled_network(synthquant: Command) -> None:
    listed = json.loads(synthquant("list", "--json").out)
    assert set(listed["synthesize"]) == set(SYNTHESIZERS.names())
    assert set(listed["quantize"]) == set(QUANTIZERS.names())
    assert "zoo/cifar10-resnet20" in listed["zoo"]
    assert synthquant("list", "quantize").out.count("quantize    ") == len(QUANTIZERS.names())
    assert {line.split(maxsplit=2)[1] for line in synthquant("list", "zoo").out.splitlines()} == set(listed["zoo"])


@pytest.mark.parametrize("method", [*SYNTHESIZERS.names(), *SELECTORS.names(), *QUANTIZERS.names()])
def test_show_explains_every_setting(synthquant: Command, method: str) -> None:
    shown = json.loads(synthquant("show", method, "--json").out)
    assert all(entry["description"] for entry in shown["settings"])
    text = synthquant("show", method).out
    assert all(f"  {entry['name']} (" in text for entry in shown["settings"])


def test_show_tells_range_and_default(synthquant: Command) -> None:
    iterations = GenieM.model_fields["iterations"].default
    assert f"iterations (int, >= 0) = {iterations}" in synthquant("show", "genie_m").out
    assert "tuning (FewShotTuning | None) = None" in synthquant("show", "text_to_image").out
    assert "slack.percentile (float, >= 0 and <= 1) = 0.9" in synthquant("show", "zeroq").out


@pytest.mark.parametrize("command", ["demo", "run", "synthesize", "select", "quantize"])
def test_commands_that_compute_take_the_common_options(synthquant: Command, command: str) -> None:
    outcome = synthquant(command, "--help")
    assert outcome.status == 0
    assert all(option in outcome.out for option in ("--device", "--seed", "--set FIELD=VALUE", "--json"))


def test_evaluate_has_no_seed_for_it_draws_nothing(synthquant: Command) -> None:
    outcome = synthquant("evaluate", "--help")
    assert all(option in outcome.out for option in ("--device", "--set FIELD=VALUE", "--json"))
    assert "--seed" not in outcome.out


def test_help_and_version_of_the_whole(synthquant: Command) -> None:
    outcome = synthquant("--help")
    commands = ("demo", "run", "synthesize", "select", "quantize", "evaluate", "report", "list", "show")
    assert outcome.status == 0 and all(f"\n  {command} " in outcome.out for command in commands)
