"""Model cards: what the hub reads is what was measured, the lines that load a network do, and nothing is made up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCardData
from tests.cli.conftest import Command, synthquant  # noqa: F401  # a fixture
from tests.small_networks import calibrated_model, small_float_model, small_images
from torch import nn

import synthquant as sq
from synthquant.core.errors import InputError, ModelError
from synthquant.export.checkpoint import load_checkpoint
from synthquant.export.model_card import _base_model, _named
from synthquant.export.quant_config import FloatModelEntry

QUIET = {"progress": sq.Progress()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that measured on labelled images."""
    root = tmp_path_factory.mktemp("cards")
    small_images(21).save(root / "photos")
    recipe = {
        "model": small_float_model(root).source.model_dump(mode="json"),
        "images": {"method": "noise", "count": 9},
        "quantize": {"method": "rtn", "scheme": "W4A4"},
        "evaluate": {"data": str(root / "photos")},
        "device": "cpu",
    }
    sq.run(sq.Recipe.parse(recipe), root / "run")
    return root / "run"


def front(card: str) -> dict[str, Any]:
    _, head, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(head)
    return found


def lines_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.+?)```", card, flags=re.DOTALL)
    return str(code)


def test_the_hub_reads_what_the_run_measured(run: Path) -> None:
    card = sq.card(run, license="apache-2.0")
    head = front(card)
    assert list(head) == ["library_name", "license", "pipeline_tag", "tags", "metrics", "model-index"]
    assert head["library_name"] == "synthquant" and head["license"] == "apache-2.0"
    assert head["pipeline_tag"] == "image-classification"
    assert head["tags"] == ["synthquant", "quantized", "w4a4", "zero-shot"]
    assert head["metrics"] == ["accuracy", "agreement", "kl"]
    read = ModelCardData(**head)  # as the hub's own library reads it
    _, row = sq.RunRecord.load(run / "run.json").stages["evaluate"].metrics["accuracy"]
    values = [(one.metric_type, one.metric_value) for one in read.eval_results or []]
    assert values == [
        ("accuracy", row["top1"]), ("accuracy", row["top5"]), ("agreement", row["agreement"]), ("kl", row["kl"]),
    ]  # fmt: skip
    assert {one.dataset_name for one in read.eval_results or []} == {"photos"}
    assert {one.task_type for one in read.eval_results or []} == {"image-classification"}
    assert "On 21 samples of `photos`, with labels:" in card and f"| {100 * row['top1']:.2f} |" in card
    assert "quantized with 9 samples that were made with `noise`, none of them real" in card
    assert "| quantize.method | rtn |" in card and "layers of 4 bits" in card and "100.0% of multiply-adds" in card
    assert str(run.parent) not in card, "no path of this machine"
    assert "license" not in front(sq.card(run))


def test_the_card_lies_beside_the_checkpoint_and_a_command_prints_it(
    run: Path,
    tmp_path: Path,
    synthquant: Command,  # noqa: F811
) -> None:
    card = (run / "model" / "README.md").read_text()
    assert card == sq.card(run) == sq.card(str(run / "model")) == synthquant("card", run).out
    assert synthquant("card", run, "--license", "mit", "--out", tmp_path / "card.md").status == 0
    assert (tmp_path / "card.md").read_text() == sq.card(run, license="mit")
    assert "must end in .md" in synthquant("card", run, "--out", run / "run.json").error
    assert "'Apache 2.0': give an identifier of the hub" in synthquant("card", run, "--license", "Apache 2.0").error
    assert "is not a checkpoint" in synthquant("card", tmp_path).error


def test_the_lines_of_the_card_load_the_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)  # where the network's code lies
    (run.parent / "FOLDER").symlink_to(run / "model")
    names: dict[str, Any] = {}
    exec(lines_of(sq.card(run)), names)
    assert names["outputs"].shape == (1, 7) and isinstance(names["quant_model"], sq.QuantModel)
    assert names["pixels"].shape == (1, 3, 16, 16)
    again = names["preprocess"]([torch.zeros(3, 40, 20, dtype=torch.uint8)], "raw")
    assert names["quant_model"](again).shape == (1, 7)


def test_a_network_in_memory_is_asked_for_by_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    model = sq.FloatModel.from_module(network, input_size=8, mean=[0.5], std=[0.5], name="tiny")
    pixels = torch.rand(6, 1, 8, 8)
    quant_model = sq.quantize(model, pixels, method="rtn", **QUIET)
    quant_model.save("FOLDER")
    card = (tmp_path / "FOLDER" / "README.md").read_text()
    assert card == sq.card("FOLDER")
    head = front(card)
    assert list(head) == ["library_name", "pipeline_tag", "tags"] and "zero-shot" not in head["tags"]
    assert "Not measured." in card and "How far it is from the float network is not known" in card
    assert "The run that made it is not known." in card and "a network that was given in memory" in card
    names: dict[str, Any] = {"module": network}
    exec(lines_of(card), names)
    assert names["outputs"].shape == (1, 3)
    quant_model.save("FOLDER", float_graph=True)
    whole: dict[str, Any] = {}
    exec(lines_of(sq.card("FOLDER")), whole)
    assert whole["outputs"].shape == (1, 3), "without the module, which is in the folder"
    row = sq.evaluate(quant_model, pixels, **QUIET)
    told = sq.card("FOLDER", measured=row, data="six pictures")
    metrics = {one["type"]: one["value"] for one in front(told)["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"agreement": row["agreement"], "kl": row["kl"]}
    assert "On 6 samples of `six pictures`, without labels:" in told and "Not measured" not in told


def test_a_network_that_takes_no_images_has_a_card_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = (torch.rand(4, 6),)
    module = nn.Linear(6, 3)
    model = sq.FloatModel.from_module(module, example=example, task="embed")
    quant_model = sq.quantize(model, [sq.Inputs.of(*example)], method="rtn", **QUIET)
    quant_model.save("FOLDER")
    names: dict[str, Any] = {"module": module, "example": example}
    exec(lines_of(sq.card("FOLDER")), names)
    assert torch.equal(names["quant_model"](*example), quant_model(*example))
    row = sq.evaluate(quant_model, [sq.Inputs.of(*example)], **QUIET)
    told = sq.card("FOLDER", measured=row | {"metrics": {"mine": 0.25}})
    result = front(told)["model-index"][0]["results"][0]
    assert result["task"]["type"] == "image-feature-extraction"
    assert {one["type"]: one["value"] for one in result["metrics"]} == {
        "sqnr": row["sqnr"],
        "mine": 0.25,
        "cosine_with_float": row["outputs"]["agreement"][""]["cosine"],
    }
    assert f"Output beside the float network's: {row['sqnr']:.1f} dB, cosine" in told


def test_numbers_of_another_network_are_not_its_own(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"
    calibrated_model(small_float_model(tmp_path)).save(other / "model")
    (other / "run.json").write_bytes((run / "run.json").read_bytes())
    assert "Not measured." in sq.card(other) and "model-index" not in front(sq.card(other))
    loaded = load_checkpoint(run / "model", trust_code=True)
    loaded.save(tmp_path / "copy")
    assert "Not measured." in sq.card(tmp_path / "copy")
    (other / "model" / "quant_config.json").write_text("{}")
    with pytest.raises(ModelError):
        sq.card(other)
    with pytest.raises(InputError, match="identifier of the hub"):
        sq.card(run, license="")


@pytest.mark.parametrize(
    ("source", "weights", "base", "named"),
    [
        ("timm/resnet18.a1_in1k", None, "timm/resnet18.a1_in1k", "`timm/resnet18.a1_in1k`"),
        ("timm/resnet18", None, None, "`timm/resnet18`"),
        ("timm/resnet18.a1_in1k", "/home/me/mine.pt", None, "`timm/resnet18.a1_in1k` with weights of `mine.pt`"),
        ("transformers/google/vit-base-patch16-224", None, "google/vit-base-patch16-224", None),
        ("transformers/{folder}", None, None, "`net`"),
        ("torchvision/mobilenet_v2.IMAGENET1K_V1", None, None, "`torchvision/mobilenet_v2.IMAGENET1K_V1`"),
        ("zoo/cifar10-resnet20", None, None, "`zoo/cifar10-resnet20`"),
        ("/home/me/net.py:build", None, None, "`net.py:build`"),
        ("memory/Net", None, None, "`net`, a network that was given in memory"),
    ],
)
def test_the_base_model_is_named_where_the_hub_has_it(
    source: str, weights: str | None, base: str | None, named: str | None, tmp_path: Path
) -> None:
    source = source.format(folder=tmp_path)
    origin = {"source": source, "weights": weights}
    entry = FloatModelEntry.model_validate({"name": "net", "source": origin, "fingerprint": "f"})
    wanted = {} if base is None else {"base_model": base, "base_model_relation": "quantized"}
    assert _base_model(entry) == wanted
    assert _named(entry) == (named or f"`{source}`")
