"""A user's metric: what it is given, for float and quantized alike, where its numbers stand, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.small_networks import small_float_model, small_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import synthquant as sq
from synthquant.core.errors import DataError, InputError, UnsupportedModelError
from synthquant.data.targets import Targets, split_targets
from synthquant.evaluate.metrics import MaskAgreement, Metric
from synthquant.pipeline import run
from synthquant.recipe import Recipe

QUIET = {"progress": sq.Progress()}
SIZE = {"input_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
PIXELS = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(3)).mul(255).to(torch.uint8)
LABELS = torch.arange(20) % 4


class Segmentation(nn.Module):
    """Three classes a pixel, and a vector beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        return {"out": self.head(x), "vector": x.mean((2, 3))}


def made(network: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network()


@pytest.fixture(scope="module")
def classifier() -> sq.FloatModel:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return sq.FloatModel.from_module(made(lambda: nn.Sequential(*layers)), **SIZE)


@pytest.fixture(scope="module")
def dense() -> sq.FloatModel:
    return sq.FloatModel.from_module(made(Segmentation), task="dense", **SIZE)


@pytest.fixture(scope="module")
def quantized(dense: sq.FloatModel) -> sq.QuantModel:
    return sq.quantize(dense, PIXELS, "W4A4", method="rtn", **QUIET)


class Counted(Dataset[Any]):
    """Images with boxes, of which each image has another number."""

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return PIXELS[index], {"boxes": torch.full((index % 3, 4), float(index)), "labels": torch.arange(index % 3)}


def balanced(logits: Tensor, labels: Tensor) -> Tensor:
    assert logits.shape == (20, 4) and labels.dtype == torch.int64
    hits = logits.argmax(1) == labels
    return torch.stack([hits[labels == one].double().mean() for one in range(4)]).mean()


class Running:
    """`balanced`, batch by batch."""

    def __init__(self) -> None:
        self.hits = self.all = torch.zeros(4)
        self.calls = 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        hits, self.calls = logits.argmax(1) == labels, self.calls + 1
        self.hits = self.hits + torch.bincount(labels[hits], minlength=4)
        self.all = self.all + torch.bincount(labels, minlength=4)

    def compute(self) -> dict[str, Any]:
        return {"balanced": (self.hits / self.all).mean(), "calls": self.calls, "nothing": float("nan")}


def test_a_function_gets_all_outputs_once_of_both_networks(classifier: sq.FloatModel) -> None:
    quant_model = sq.quantize(classifier, PIXELS, "W4A4", method="rtn", **QUIET)
    wanted = [float(balanced(sq.evaluate_model(net, classifier.preprocess, PIXELS, reference_logits=torch.zeros(20, 4))
                             .logits, LABELS)) for net in (classifier.module, quant_model)]  # fmt: skip
    data = (PIXELS, LABELS)
    row = sq.evaluate(quant_model, data, metric=balanced, batch_size=7, **QUIET)
    assert row["float_metrics"] == {"balanced": wanted[0]} and row["metrics"] == {"balanced": wanted[1]}
    assert row["top1"] is not None and row["agreement"] is not None
    assert sq.evaluate(classifier, data, metric=balanced, **QUIET)["metrics"] == {"balanced": wanted[0]}
    assert "metrics" not in sq.evaluate(classifier, data, **QUIET)


class Told(sq.Progress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize("metric", [Running, Running()])
def test_an_object_gets_batches_and_each_network_a_fresh_one(quantized: sq.QuantModel, metric: Any) -> None:
    sizes: list[int] = []

    class Sizes(Running):
        def update(self, outputs: Any, targets: Any) -> None:
            sizes.append(len(outputs["vector"]))
            super().update(outputs["vector"][:, :4], targets)

    told = Told()
    subject = Sizes if isinstance(metric, type) else Sizes()
    row = sq.evaluate(quantized, (PIXELS, LABELS), metric=subject, batch_size=8, progress=told)
    assert sizes == [8, 8, 4] * 2
    assert row["metrics"]["calls"] == row["float_metrics"]["calls"] == 3
    assert row["metrics"]["nothing"] is None
    assert "evaluate quantized: nothing is not a finite number" in told.warnings
    assert isinstance(metric, type) or metric.calls == 0


def test_targets_of_a_loader_reach_the_metric_in_order(quantized: sq.QuantModel) -> None:
    seen: list[Any] = []

    def matched(outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> float:
        seen.append(targets)
        return float(len(outputs["out"]) == len(targets))

    def alike(batch: list[Any]) -> tuple[Tensor, list[Any]]:
        return torch.stack([image for image, _ in batch]), [target for _, target in batch]

    for data in (Counted(), DataLoader(Counted(), 6, collate_fn=alike)):
        row = sq.evaluate(quantized, data, metric=matched, **QUIET)
        assert row["metrics"] == row["float_metrics"] == {"matched": 1.0}
        for index, target in enumerate(seen[-1]):
            assert torch.equal(target["boxes"], Counted()[index][1]["boxes"])
    row = sq.evaluate(quantized, PIXELS, metric=lambda _, y: {"mean": y.mean()}, targets=torch.arange(20.0), **QUIET)
    assert row["metrics"] == {"mean": 9.5}
    with pytest.raises(DataError, match="there are 3 targets for 20 samples"):
        sq.evaluate(quantized, PIXELS, metric=lambda _, y: 1, targets=[1, 2, 3], **QUIET)


def test_broken_images_take_their_targets_with_them(dense: sq.FloatModel, tmp_path: Path) -> None:
    for index in range(5):
        Image.fromarray(np.full((8, 8, 3), 40 * index, np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "2.png").write_bytes(b"no picture")
    images = sq.open_images(tmp_path).with_columns(target=[0.0, 1.0, 2.0, 3.0, 4.0])
    row = sq.evaluate(dense, images, metric=lambda _, y: {f"at {at}": value for at, value in enumerate(y)}, **QUIET)
    assert list(row["metrics"].values()) == [0.0, 1.0, 3.0, 4.0]
    layers = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = sq.FloatModel.from_module(made(lambda: nn.Sequential(*layers)), **SIZE)
    quant_model = sq.quantize(model, PIXELS, method="rtn", **QUIET)
    row = sq.evaluate(quant_model, images, metric=lambda _, y: {"sum": y.sum()}, **QUIET)
    assert row["metrics"] == row["float_metrics"] == {"sum": 8.0}


def test_dense_networks_are_compared_with_masks(quantized: sq.QuantModel, dense: sq.FloatModel) -> None:
    mean, std = torch.tensor(0.5), torch.tensor(0.25)
    inputs = (PIXELS / 255 - mean) / std
    masks = dense.module(inputs)["out"].argmax(1)
    other = masks.clone()
    other[:, :4] = 255
    data = list(zip(PIXELS, other.to(torch.uint8), strict=True))
    row = sq.evaluate(quantized, data, **QUIET)
    assert row["float_metrics"] == {"pixel_accuracy out": 1.0, "miou out": 1.0}
    agreement = row["outputs"]["agreement"]["out"]
    whole = sq.evaluate(quantized, list(zip(PIXELS, masks, strict=True)), **QUIET)["metrics"]
    assert whole == pytest.approx({"pixel_accuracy out": agreement["pixels"], "miou out": agreement["miou"]})
    assert row["metrics"]["miou out"] != whole["miou out"] and 0.3 < row["metrics"]["miou out"] < 1
    assert sq.evaluate(dense, data, **QUIET)["metrics"] == row["float_metrics"]
    told = Told()
    small = list(zip(PIXELS, masks[:, :4].to(torch.uint8), strict=True))
    assert sq.evaluate(dense, small, progress=told)["metrics"] == {}
    assert "no output is of the size of the masks" in told.warnings[0]
    with pytest.raises(DataError, match=r"masks have the class 9, and output out has 3 channels"):
        sq.evaluate(dense, list(zip(PIXELS, torch.full_like(masks, 9), strict=True)), **QUIET)
    with pytest.raises(UnsupportedModelError, match="is no classifier"):
        sq.evaluate(dense, PIXELS, **QUIET)


def test_overlap_with_masks_by_hand() -> None:
    measured = MaskAgreement()
    maps = torch.tensor([[[0, 0, 1, 1]], [[1, 2, 2, 2]]])
    masks = torch.tensor([[[0, 1, 1, 255]], [[1, 2, 2, -1]]])
    output = nn.functional.one_hot(maps, 3).movedim(-1, 1).float()
    for index in range(2):
        measured.update(output[index : index + 1], masks[index : index + 1])
    assert measured.compute() == {"pixel_accuracy": 5 / 6, "miou": pytest.approx((1 / 2 + 2 / 3 + 1) / 3)}


def test_targets_are_told_apart_or_refused() -> None:
    boxes, labels = torch.zeros(3, 2, 4), torch.arange(3)
    assert [tuple(one["boxes"].shape) for one in split_targets({"boxes": boxes, "labels": labels}, 3, True, "x")] == [
        (2, 4)
    ] * 3
    assert [one[1] for one in split_targets([boxes, labels], 3, True, "x")] == [0, 1, 2]
    assert split_targets([{"a": 1}, {"a": 2}], 2, True, "x") == [{"a": 1}, {"a": 2}]
    assert split_targets(labels, 1, False, "x") == [labels]
    with pytest.raises(DataError, match="it cannot be told what of the targets"):
        split_targets([boxes[:2], labels[:2]], 2, True, "x")
    picture = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    stacked = Targets([picture, [[1, 2, 3], [4, 5, 6]]]).at([0, 1])
    assert isinstance(stacked, list) and stacked[0].dtype == torch.uint8 and stacked[1].shape == (2, 3)
    assert torch.equal(Targets([[1, 2], [3, 4]]).at([1]), torch.tensor([[3, 4]]))  # type: ignore[arg-type]


def failing(outputs: Any, targets: Any) -> float:
    raise KeyError("boxes")


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (failing, r"^metric failing failed: KeyError: 'boxes' \(test_metrics.py, line \d+\)$"),
        (lambda x, y: "good", r"^metric metric gives a str as metric; it must give a number"),
        (lambda x, y: {"a": torch.zeros(3)}, r"gives a Tensor of shape \[3\] as a; it must give a number"),
        (lambda x: 1.0, r"^metric metric must take outputs and targets"),
        (3, r"^a int is no metric; give a function of outputs and targets"),
        (nn.Module, r"^Module is no metric"),
        ("nothing.py:f", r"^file nothing.py does not exist"),
        ("miou", r"^metric 'miou' is not FILE.py:NAME"),
    ],
)
def test_a_metric_that_fails_is_one_line(classifier: sq.FloatModel, metric: Any, said: str) -> None:
    with pytest.raises(InputError) as caught:
        sq.evaluate(classifier, (PIXELS, LABELS), metric=metric, **QUIET)
    assert re.search(said, str(caught.value)) and "\n" not in str(caught.value)


def test_outputs_that_cannot_be_joined_need_an_object(dense: sq.FloatModel) -> None:
    measuring = Metric.of(lambda x, y: 1.0).started()
    measuring.add(torch.zeros(2, 3), [0, 1], None)
    measuring.add(torch.zeros(2, 4), [2, 3], None)
    with pytest.raises(InputError, match=r"cannot be joined.*update\(outputs, targets\)"):
        measuring.values(None)


CODE = """
from beside_metrics import SHARE

def hits(logits, labels):
    return {"hits": (logits.argmax(1) == labels).float().mean() * SHARE, "count": len(labels)}

def half(logits, labels):
    raise RuntimeError("too few" if len(labels) < 12 else "enough")
"""


@pytest.fixture
def metrics_file(tmp_path: Path) -> Path:
    (tmp_path / "beside_metrics.py").write_text("SHARE = 0.5\n")
    (tmp_path / "metrics.py").write_text(CODE)
    return tmp_path / "metrics.py"


def recipe(tmp_path: Path, metric: str) -> dict[str, Any]:
    small_images(12).save(tmp_path / "data")
    source = small_float_model(tmp_path).source.source
    return {
        "model": {"source": source, "input_size": [16, 16], "mean": [0.5] * 3, "std": [0.25] * 3},
        "images": {"method": "noise", "count": 4},
        "quantize": {"method": "rtn", "scheme": "W4A4"},
        "evaluate": {"data": str(tmp_path / "data"), "metric": metric, "batch_size": 8},
        "device": "cpu",
    }


def test_a_run_keeps_the_numbers_and_shows_them(tmp_path: Path, metrics_file: Path) -> None:
    record = run(Recipe.parse(recipe(tmp_path, f"{metrics_file}:hits")), tmp_path / "run")
    rows = record.stages["evaluate"].metrics["accuracy"]
    assert [row["metrics"] for row in rows] == [{"hits": pytest.approx(row["top1"] / 2), "count": 12} for row in rows]
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<th class="n">count</th><th class="n">hits</th>' in page
    assert f'<td class="n">{rows[1]["metrics"]["hits"]:.4f}</td>' in page
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert re.search(rf"\| W4A4 \|.*\| 12\.0000 \| {rows[1]['metrics']['hits']:.4f} \|", card)


def test_a_metric_that_fails_ends_a_run_before_any_work(tmp_path: Path, metrics_file: Path) -> None:
    said = (
        r"metric half failed: RuntimeError: too few \(metrics.py, line 8\); it was tried on 8 samples before any work"
    )
    with pytest.raises(InputError, match=said):
        run(Recipe.parse(recipe(tmp_path, f"{metrics_file}:half")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_targets_of_a_parquet_column(tmp_path: Path, dense: sq.FloatModel) -> None:
    images = sq.ImageSet.from_tensors(PIXELS, columns={"mask": [[[1] * 8] * 8] * 20, "depth": list(range(20))})
    images.save(tmp_path / "set")
    row = sq.evaluate(
        dense, tmp_path / "set", targets="mask", metric=lambda x, y: float(y.shape == (20, 8, 8)), **QUIET
    )
    assert row["metrics"]["metric"] == 1.0 and 0 <= row["metrics"]["miou out"] < 1
    with pytest.raises(DataError, match="image set has no column 'masks'; did you mean 'mask'"):
        sq.evaluate(dense, tmp_path / "set", targets="masks", **QUIET)
    with pytest.raises(DataError, match="column 'target' cannot be stored"):
        sq.open_images(Counted(), targets=True).save(tmp_path / "kept")
