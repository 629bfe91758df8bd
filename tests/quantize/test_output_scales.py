"""Outputs whose parts differ in scale keep the small ones: in the network, in its checkpoint and in its ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import synthquant as sq
from synthquant.quantize.output_scales import spare_outputs

SIZE = {"input_size": 8, "mean": (0.5,) * 3, "std": (0.25,) * 3}
PIXELS = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(3)).mul(255).to(torch.uint8)
FULL = {"preset": "W8A8", "deploy": "full"}


class Head(nn.Module):
    """Two levels of boxes of 0..640 beside scores of 0..1, joined as YOLO's are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.box, self.score = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.stem(x).relu()
        far = self.down(near).relu()
        levels = [torch.cat([self.box(f).sigmoid() * 640, self.score(f).sigmoid()], 1).flatten(2) for f in (near, far)]
        return torch.cat(levels, 2)


class Single(nn.Module):
    """One layer whose channels differ in scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1, bias=False)
        with torch.no_grad():
            self.head.weight[0] = self.head.weight[1] * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu())


class Said(sq.Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def network(make: Any, task: Any = "detect", **how: Any) -> sq.FloatModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return sq.FloatModel.from_module(make(), task=task, **SIZE, **how)


def scores(model: sq.FloatModel, quant_model: Any) -> tuple[Tensor, Tensor]:
    inputs = model.preprocess(PIXELS, "cropped")
    with torch.no_grad():
        return model.module(inputs)[:, 4:], quant_model(inputs)[:, 4:]


def test_scores_beside_boxes_survive_in_network_checkpoint_and_file(tmp_path: Path) -> None:
    model, said = network(Head), Said()
    quant_model = sq.quantize(model, PIXELS, method="rtn", target="ort-cpu", progress=said)
    wanted, found = scores(model, quant_model)
    assert float((found - wanted).abs().max()) < 0.02 and len(found.unique()) > 20
    (line,) = [line for line in said.lines if "differ in scale" in line]
    assert all(f"{name} (" in line for name in ("cat_0", "cat_1", "cat_2")) and "mul" not in line
    rows = {row.name: row for row in quant_model.coverage()}
    assert rows["cat_2"].reason == rows["cat_0"].reason == "the scheme leaves its output in float"
    assert rows["cat_0"].input_bits == 8 and rows["cat_0"].output_bits is None and rows["sigmoid_1"].output_bits == 8
    quant_model.save(tmp_path / "kept")
    assert torch.equal(scores(model, sq.load(tmp_path / "kept", model))[1], found)
    pytest.importorskip("onnxruntime")
    import onnxruntime

    path = quant_model.export(tmp_path / "head.onnx", target="ort-cpu", images=PIXELS, progress=sq.Progress())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = model.preprocess(PIXELS, "cropped").numpy()
    (written,) = session.run(None, {session.get_inputs()[0].name: inputs})
    assert float((torch.from_numpy(written)[:, 4:] - wanted).abs().max()) < 0.02


@pytest.mark.parametrize(("scale", "spared"), [(100.0, True), (8.0, False)])
def test_a_layer_that_is_an_output(scale: float, spared: bool) -> None:
    quant_model = sq.QuantModel.build(network(lambda: Single(scale), "other"), FULL)
    assert quant_model.output_quantizers == ["head.output_quantizer"]
    found = spare_outputs(quant_model, sq.open_images(PIXELS))
    assert (found.keys() == {"head.output_quantizer"}) is spared and bool(found) is spared
    assert ("head.output_quantizer" in quant_model.quantizers) is not spared
    named = [row.reason for row in quant_model.coverage() if row.name == "head.output_quantizer"]
    assert named == ["the scheme leaves its output in float"] * spared
    assert not spared or found["head.output_quantizer"] == pytest.approx(scale, rel=1e-3)


def test_logits_other_deployments_and_what_is_asked_for_stay() -> None:
    images = sq.open_images(PIXELS)
    logits = sq.FloatModel.from_module(
        nn.Sequential(Single(100.0), nn.AdaptiveAvgPool2d(1), nn.Flatten()), num_classes=2, **SIZE
    )
    assert spare_outputs(sq.QuantModel.build(logits, FULL), images) == {}
    model = network(Head)
    assert spare_outputs(sq.QuantModel.build(model, "W8A8"), images) == {}
    asked = {"cat_*": {"input_activations": {"num_bits": 8}}}
    assert spare_outputs(sq.QuantModel.build(model, FULL | {"overrides": asked}), images) == {}


def test_without_images_noise_tells() -> None:
    quant_model = sq.QuantModel.build(network(Head), FULL)
    assert spare_outputs(quant_model, None).keys() == {"cat_0", "cat_1", "cat_2"}
