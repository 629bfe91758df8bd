"""Outputs of networks of any task: channels, agreement, and what a shared grid takes from small channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.toy_networks import Detector
from torch import Tensor, nn

import synthquant as sq
from synthquant.core.run_metrics import EvaluateMetrics
from synthquant.evaluate.outputs import OutputSqnr, compare_outputs
from synthquant.models.float_model import ModelSource, Task
from synthquant.models.open import open_model
from synthquant.models.signature import channel_dim

QUIET = {"progress": sq.Progress()}
SIZE = {"input_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}


def sums(task: Task, wanted: Tensor, found: Tensor) -> OutputSqnr:
    """In two batches."""
    return compare_outputs((({"y": wanted[rows]}, {"y": found[rows]}) for rows in (slice(0, 2), slice(2, None))), task)


def test_channels_by_hand() -> None:
    wanted = torch.tensor([1.0, 100.0]).expand(4, 2)
    found = wanted + torch.tensor([0.1, 0.0])
    result = sums("other", wanted, found)
    assert result.channels["y"][0] == pytest.approx(20, abs=1e-3) and result.channels["y"][1] is None
    assert result.agreement == {} and result.same_answers is None
    assert sums("other", torch.ones(4, 200), torch.zeros(4, 200)).channels == {}


@pytest.mark.parametrize(
    ("shape", "dim"), [((4,), None), ((4, 9), 1), ((4, 300, 6), 2), ((4, 84, 300), 1), ((4, 3, 8, 8), 1)]
)
def test_where_channels_are(shape: tuple[int, ...], dim: int | None) -> None:
    assert channel_dim(torch.zeros(shape)) == dim


def test_maps_agree_by_pixels_and_by_overlap() -> None:
    classes = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 2, 2]])
    other = classes.clone()
    other[0, 0] = 1
    maps = [nn.functional.one_hot(one, 3).movedim(-1, 1)[:, :, None].float() for one in (classes, other)]
    found = sums("dense", *maps)
    assert found.agreement["y"]["pixels"] == pytest.approx(11 / 12) == found.same_answers
    assert found.agreement["y"]["miou"] == pytest.approx((3 / 4 + 4 / 5 + 1) / 3)
    depth = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    noisy = depth + 0.1 * torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.corrcoef(torch.stack([depth.flatten(), noisy.flatten()]).double())[0, 1]
    assert sums("dense", depth, noisy).agreement["y"] == {"correlation": pytest.approx(float(expected))}


def test_vectors_agree_by_their_angle() -> None:
    wanted = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    found = sums("embed", wanted, torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 1.0]]))
    assert found.agreement["y"]["cosine"] == pytest.approx(2 / 3)


class Boxes(nn.Module):
    """Boxes of 0..640 and scores of 0..1 in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.box, self.score = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.box(x).sigmoid() * 640, self.score(x).sigmoid()], 1).flatten(2)


class Warnings(sq.Progress):
    def __init__(self) -> None:
        self.found: list[str] = []

    def warn(self, text: str) -> None:
        self.found.append(text)


def test_scores_that_vanish_beside_boxes_are_said() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = sq.FloatModel.from_module(Boxes(), **SIZE, task="detect")
        images = torch.rand(8, 3, 8, 8)
    on_one_grid = {"cat_0": {"input_activations": {"num_bits": 8}}}  # asked for
    for scheme, weak in (({"preset": "W8A8", "deploy": "full", "overrides": on_one_grid}, True), ("W8A8", False)):
        quant_model = sq.quantize(model, images, scheme, "rtn", **QUIET)
        told = Warnings()
        row = sq.evaluate(quant_model, images, progress=told)
        scores = row["outputs"]["channels"][""][4:]
        assert row["sqnr"] > 40 and (max(scores) < 1) is weak
        assert any("channel 4 of 6 has an SQNR of 0.0 dB" in text for text in told.found) is weak


def test_a_run_measures_maps_on_images_that_are_named(tmp_path: Path) -> None:
    sq.ImageSet.from_tensors(torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)).save(tmp_path / "images")
    (tmp_path / "net.py").write_text(
        "import torch\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1))\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "model: {source: 'net.py:build', input_size: [8, 8], mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2],"
        " task: dense}\nimages: {source: images}\nquantize: {method: rtn, scheme: W8A8}\nevaluate: images\n"
    )
    record = sq.run(sq.Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "run")
    found = record.metrics("evaluate", EvaluateMetrics)
    assert found.output_sqnr is not None and found.accuracy is not None
    agreement = found.output_sqnr.agreement[""]
    assert agreement["pixels"] == found.accuracy[1].agreement and agreement["pixels"] > 0.9 < agreement["miou"]
    assert f"miou {agreement['miou']:.4f}" in (tmp_path / "run" / "report.html").read_text()
    row = sq.evaluate(tmp_path / "run", tmp_path / "images", trust_code=True, device="cpu", **QUIET)
    assert row["outputs"]["agreement"] == {"": agreement}


def test_outputs_of_a_network_that_takes_no_images() -> None:
    x = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = sq.FloatModel.from_module(Detector(), example={"image": x[:2]}, task="embed")
    inputs = sq.Inputs(kwargs={"image": x})
    row = sq.evaluate(sq.quantize(model, inputs, method="rtn", **QUIET), inputs, **QUIET)
    assert row["outputs"]["outputs"].keys() == {"boxes.0", "boxes.1", "scores"}
    assert row["outputs"]["agreement"]["scores"]["cosine"] > 0.99


@pytest.mark.parametrize("opens", [True, False])
def test_files_of_other_tasks_are_measured(opens: bool, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1))
    model = sq.FloatModel.from_module(module, **SIZE, task="dense")
    if opens:  # what opens again is of a file
        torch.save(module.state_dict(), tmp_path / "net.pt")
        (tmp_path / "net.py").write_text(
            "import torch\n\n\ndef build():\n"
            "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1))\n"
        )
        where = {"source": f"{tmp_path / 'net.py'}:build", "weights": str(tmp_path / "net.pt"), "task": "dense"}
        model = open_model(ModelSource(input_size=(8, 8), mean=SIZE["mean"], std=SIZE["std"], **where))
    quant_model = sq.quantize(model, images, target="ort-cpu", method="rtn", **QUIET)
    file = quant_model.export(tmp_path / "net.onnx", images=images, **QUIET)
    where = {"trust_code": True, "batch_size": 4, **QUIET}
    if opens:
        row, wanted = sq.evaluate(file, images, **where), sq.evaluate(quant_model, images, **QUIET)
        assert row["sqnr"] == pytest.approx(wanted["sqnr"], abs=0.5) and 20 < row["sqnr"] < 60
        assert row["outputs"]["agreement"][""].keys() == {"pixels", "miou"} and row["count"] == 6
        assert row["agreement"] == pytest.approx(wanted["agreement"], abs=0.02)
    else:
        with pytest.raises(sq.ModelError, match="no float network to compare its outputs with; give a metric"):
            sq.evaluate(file, images, **where)
    row = sq.evaluate(file, images, metric=lambda outputs, targets: float(outputs.mean()), **where)
    inputs = (images.float() / 255 - 0.5) / 0.25
    assert row["metrics"]["metric"] == pytest.approx(float(quant_model(inputs).mean()), abs=0.02)
    assert ("float_metrics" in row) is opens
