"""Networks that are no classifiers of images pass every stage that they can."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
from tests.toy_networks import TOYS, InMemory, Toy, toy
from torch import nn

from synthquant import pipeline
from synthquant.cli.output import print_run
from synthquant.core.errors import DataError, ModelError, UnsupportedModelError, VerificationError
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.core.run_metrics import EvaluateMetrics
from synthquant.data.preprocess import Preprocess
from synthquant.evaluate.agreement import measure_output_sqnr, measure_sqnr
from synthquant.export import Onnx, TorchProgram
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.methods import Synthesizer
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.open import open_model
from synthquant.models.signature import Inputs, named_outputs
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize import Brecq, GenieM, Rtn
from synthquant.quantize.bias_correction import correct_biases
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.equalize import equalized
from synthquant.quantize.fisher import divergence
from synthquant.recipe import Recipe
from synthquant.synthesize import GenieD, Noise, ZeroQ


def reconstructed(one: Toy, scheme: str = "W4A8", iterations: int = 40) -> tuple[QuantModel, QuantReport]:
    model = QuantModel.build(one.model, scheme)
    method = GenieM(iterations=iterations, batch_size=8, calibration_images=16)
    return model, method.apply(model, one.samples, Rng(0))


@pytest.mark.parametrize("name", TOYS)
def test_reconstruction_is_better_than_rounding(name: str, tmp_path: Path) -> None:
    one = toy(name)
    rounded = QuantModel.build(one.model, "W4A8")
    Rtn(calibration_images=16).apply(rounded, one.samples, Rng(0))
    model, report = reconstructed(one)
    assert {layer for unit in report.units for layer in unit.layers} == set(model.layers)
    before, after = (measure_output_sqnr(each, one.samples) for each in (rounded, model))
    assert before.total is not None and after.total is not None and after.total > before.total + 0.5
    assert all(row.alone is not None and row.alone > 5 for row in measure_sqnr(model, one.samples) if row.weights)
    names = named_outputs(one.samples.inputs.call(one.model.module))
    assert after.outputs.keys() == names.keys()
    if name == "detector":
        assert set(names) == {"boxes.0", "boxes.1", "scores"}
    save_checkpoint(model, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model", float_model=one.model)
    wanted, found = (named_outputs(one.samples.inputs.clone().call(each)) for each in (model, loaded))
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert measure_output_sqnr(loaded, one.samples, float_model=one.model) == after


@pytest.mark.parametrize("name", ["conditioned", "detector", "unet"])
def test_errors_are_weighted_by_what_the_answer_depends_on(name: str) -> None:
    """The Fisher of a classifier is that of its softmax, that of others the one of a normal distribution."""
    one = toy(name)
    model = QuantModel.build(one.model, "W4A8")
    method = Brecq(iterations=4, activation_iterations=2, batch_size=8, calibration_images=16, fisher="diagonal")
    report = method.apply(model, one.samples, Rng(0))
    assert report.units and all(unit.loss_end is not None for unit in report.units)


@torch.no_grad()
def test_the_sqnr_of_outputs_by_hand() -> None:
    """Signals and noises of all samples, of each output and of all together; whole numbers are none."""
    one = toy("detector")
    model = QuantModel.build(one.model, "W4A8")
    Rtn(calibration_images=16).apply(model, one.samples, Rng(0))
    found = measure_output_sqnr(model, one.samples, batch_size=5)
    with model.mode(weights=False, activations=False):
        wanted = named_outputs(one.samples.inputs.call(model))
    given = named_outputs(one.samples.inputs.call(model))
    signals = {name: float(value.double().square().sum()) for name, value in wanted.items()}
    noises = {name: float((value - given[name]).double().square().sum()) for name, value in wanted.items()}
    for name, ratio in found.outputs.items():
        assert ratio == pytest.approx(10 * math.log10(signals[name] / noises[name]), rel=1e-4)
    total = 10 * math.log10(sum(signals.values()) / sum(noises.values()))
    assert found.total == pytest.approx(total, rel=1e-4) and len(found.outputs) == 3


def test_divergence_of_two_answers() -> None:
    one, other = torch.randn(4, 3), torch.randn(4, 3)
    shares = one.softmax(1)
    wanted = (shares * (shares / other.softmax(1)).log()).sum()
    assert float(divergence(one, other, "classify")) == pytest.approx(float(wanted), rel=1e-5)
    assert float(divergence(one, other, "other")) == pytest.approx(float((one - other).square().sum()) / 2, rel=1e-5)
    answer = {"a": one, "count": torch.ones(4, dtype=torch.int64), "b": [other]}
    moved = {"a": one + 2, "count": torch.zeros(4, dtype=torch.int64), "b": [other - 1]}
    assert float(divergence(answer, moved, "other")) == pytest.approx((12 * 4 + 12) / 2)
    answer["a"].requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(moved, answer, "other"), answer["a"])
    assert torch.allclose(gradient, torch.full((4, 3), -2.0))


@pytest.mark.parametrize("name", TOYS)
def test_quantized_where_tensors_are_made(name: str) -> None:
    """Inputs have ranges of their own: only those of images are known beforehand."""
    one = toy(name)
    model = QuantModel.build(one.model, {"preset": "W8A8", "deploy": "full"})
    assert not any(quantizer.fixed for quantizer in model.quantizers.values())
    Rtn(calibration_images=16).apply(model, one.samples, Rng(0))
    found = measure_output_sqnr(model, one.samples)
    assert found.total is not None and found.total > 20
    room = {quantizer.headroom for quantizer in model.quantizers.values()}  # logits of given samples may be larger
    assert room == ({1.0, 2.0} if one.model.task == "classify" else {1.0})
    if name == "unet":
        given, grid = one.samples.inputs.tensors[0][:16], model.quantizers["stem.input_quantizer"].grid()
        assert float(grid["scale"]) * 255 == pytest.approx(float(given.max() - given.min()), rel=0.3)


@pytest.mark.parametrize("name", TOYS)
def test_written_files_give_the_same_outputs(name: str, tmp_path: Path) -> None:
    one = toy(name)
    model = QuantModel.build(one.model, {"preset": "W7A8", "ends": "same", "weights": {"symmetric": True}})
    Rtn(calibration_images=16).apply(model, one.samples, Rng(0))
    path = Onnx().export(model, tmp_path / "x.onnx")
    found = Onnx().verify(model, path, one.samples)
    names = {output.name for output in onnx.load(str(path)).graph.output}
    given = [(value.name, value.type.tensor_type) for value in onnx.load(str(path)).graph.input]
    assert all(kind.shape.dim[0].dim_param for _, kind in given)
    wanted = {
        "conditioned": (["x", "number", "extra.mask"], {"logits"}),
        "detector": (["image"], {"boxes.0", "boxes.1", "scores", "best"}),
        "tokens": (["tokens"], {"output"}),
        "unet": (["sample", "step"], {"output"}),
    }[name]
    assert ([given_name for given_name, _ in given], names) == wanted
    rows = found["as_written"].get("outputs", {"": found["as_written"]})
    assert all(row["mean_error"] < 0.02 for row in rows.values()) and len(rows) == len(names)
    assert found["samples"] == 24 and "images" not in found
    program = TorchProgram().export(model, tmp_path / "x.pt2")
    assert TorchProgram().verify(model, program, one.samples)["samples"] == 24
    if isinstance(one.model.takes, Inputs):
        with pytest.raises(ModelError, match="takes no images"):
            Onnx.open(path)
    else:
        assert len(Onnx.open(path).function([one.samples.inputs.tensors[0]])) == len(names)


def test_an_output_that_differs_is_named(tmp_path: Path) -> None:
    one = toy("detector")
    model = QuantModel.build(one.model, "W8A8")
    Rtn(calibration_images=16).apply(model, one.samples, Rng(0))
    path = Onnx(preset="simulate").export(model, tmp_path / "x.onnx")
    model.layers["far"].correct_bias(torch.full((4,), 3.0))
    with pytest.raises(VerificationError, match=r"gives values of output boxes.1 that differ"):
        Onnx().verify(model, path, one.samples)


def test_weights_equalised_and_biases_corrected() -> None:
    one = toy("detector")
    model = equalized(QuantModel.build(one.model, "W4A8"), "activations", one.samples)
    Rtn(calibration_images=16).apply(model, one.samples, Rng(0))
    report = correct_biases(model, one.samples)
    assert report.images == 24 and report.layers == 4


def test_what_is_given_must_be_what_the_network_takes() -> None:
    conditioned, unet, tokens = toy("conditioned"), toy("unet"), toy("tokens")
    with pytest.raises(DataError, match="a sample has other arguments"):
        list(CalibrationSet(QuantModel.build(unet.model, "W8A8"), tokens.samples).batches())
    wrong = InMemory(Inputs((torch.randn(6, 1, 8, 8), torch.rand(6))))
    with pytest.raises(DataError, match=r"input 1 of a sample is torch.float32 \[\], and the network takes"):
        list(CalibrationSet(QuantModel.build(unet.model, "W8A8"), wrong).batches())
    lone: Any = torch.zeros(2, 1, 8, 8)
    for source in (None, [wrong.inputs], lone):
        with pytest.raises(DataError, match=r"a \w+ is no samples; give an image set"):
            measure_output_sqnr(QuantModel.build(unet.model, "W8A8"), cast(Any, source))
    wrong.batches = lambda size, indices=None: iter([lone])  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"must be synthquant\.Inputs; one is a Tensor"):
        measure_output_sqnr(QuantModel.build(unet.model, "W8A8"), wrong)
    table = conditioned.samples.inputs
    other = InMemory(replace(table, kwargs=table.kwargs | {"scale": table.kwargs["scale"] * 2}))
    with pytest.raises(DataError, match="input scale of a sample is constant and has another value"):
        Rtn().apply(QuantModel.build(conditioned.model, "W8A8"), other, Rng(0))
    broken = conditioned.samples.inputs
    broken.tensors[0][3, 2] = torch.nan
    with pytest.raises(DataError, match="a sample to quantize with has values that are not finite"):
        list(CalibrationSet(QuantModel.build(conditioned.model, "W8A8"), InMemory(broken)).batches())
    unknown = InMemory(Inputs((tokens.samples.inputs.tensors[0] + 4,)))
    for use in (Rtn().apply, lambda model, samples, _: measure_output_sqnr(model, samples)):
        with pytest.raises(DataError, match=r"no entry for one of its whole numbers .*: input 0 runs from 4 to 15"):
            use(QuantModel.build(tokens.model, "W8A8"), unknown, Rng(0))
    with pytest.raises(UnsupportedModelError, match="takes no images, but inputs 0, 1"):
        conditioned.model.example_images(2)
    with pytest.raises(UnsupportedModelError, match="is no classifier"):
        unet.model.logits(torch.zeros(2, 1, 8, 8))


FILE = """
from tests.toy_networks import Detector, toy
from synthquant import Inputs
import torch

def detector():
    network = toy("detector").model.module
    return network

def unet():
    one = toy("unet")
    return one.model.module, one.samples.inputs.rows(0, 3)

def wrong():
    return torch.nn.Linear(2, 2), Inputs((torch.ones(2, 3),))

def empty():
    return torch.nn.Linear(2, 2), Inputs((torch.ones(0, 2),))
"""


def test_a_run_on_a_network_with_a_dictionary_of_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "networks.py"
    path.write_text(FILE, encoding="utf-8")
    model = {"source": f"{path}:detector", "input_size": [8, 8], "mean": [0.5] * 3, "std": [0.25] * 3, "task": "other"}
    images = {"method": "zeroq", "count": 8, "batch_size": 8, "iterations": 2}
    recipe = {"model": model, "images": images, "quantize": {"method": "rtn", "scheme": "W4A8"}}
    record = pipeline.run(Recipe.parse(recipe), tmp_path / "run")
    found = record.metrics("evaluate", EvaluateMetrics)
    assert found.output_sqnr is not None and found.output_sqnr.outputs.keys() == {"boxes.0", "boxes.1", "scores"}
    assert found.accuracy is not None and found.accuracy[1].sqnr == found.output_sqnr.total
    print_run(tmp_path / "run", record, as_json=False)
    assert "SQNR" in (printed := capsys.readouterr().out) and "dB" in printed
    assert "SQNR of the outputs of W4A8" in (tmp_path / "run" / "report.html").read_text()
    loaded = load_checkpoint(tmp_path / "run" / "model", trust_code=True)
    assert loaded.float_model.task == "other" and set(loaded(torch.randn(2, 3, 8, 8))) == {"boxes", "scores", "best"}
    with pytest.raises(UnsupportedModelError, match="is no classifier"):
        pipeline.run(Recipe.parse(recipe | {"select": ["energy:0.5"]}), tmp_path / "other")
    with pytest.raises(UnsupportedModelError, match=r"returns a dict for 2 images, .*or give --task other"):
        open_model(ModelSource.model_validate(model | {"task": "classify"}))


def test_a_user_file_gives_an_example_of_its_inputs(tmp_path: Path) -> None:
    path = tmp_path / "networks.py"
    path.write_text(FILE, encoding="utf-8")
    model = open_model(f"{path}:unet", task="other")
    assert [name for name, _ in model.example(5).named()] == ["0", "1"] and model.num_classes is None
    quant_model = QuantModel.build(model, "W8A8")
    Rtn(calibration_images=16).apply(quant_model, toy("unet").samples, Rng(0))
    loaded = load_checkpoint(save_checkpoint(quant_model, tmp_path / "model"), trust_code=True)
    x, step = toy("unet").samples.inputs.tensors
    assert torch.equal(loaded(x, step), quant_model(x, step))
    with pytest.raises(ModelError, match=r"comes with an example of its inputs, not images; leave out --mean"):
        open_model(f"{path}:unet", task="other", mean=[0.5])
    with pytest.raises(ModelError, match="wrong fails on its example"):
        open_model(f"{path}:wrong", task="other")
    with pytest.raises(ModelError, match="the example of its inputs has 0 samples"):
        open_model(f"{path}:empty", task="other")


def seen_by_batch_norms(channels: int) -> FloatModel:
    """A classifier of images of so many channels, whose batch norms have seen noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(channels, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip
        module.train()(torch.randn(16, channels, 8, 8))
    preprocess = Preprocess(input_size=(8, 8), mean=(0.5,) * channels, std=(0.25,) * channels)
    module.eval().requires_grad_(False)
    return FloatModel(module, preprocess, "channels", ModelSource(source="test"), num_classes=3)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("method", [GenieD(iterations=3, batch_size=8), ZeroQ(iterations=3, batch_size=8), Noise()])
def test_images_of_any_channels_are_made_and_quantized_with(channels: int, method: Synthesizer, tmp_path: Path) -> None:
    model = seen_by_batch_norms(channels)
    images = method.synthesize(model, 12, Rng(0)).save(tmp_path / "images")
    assert images[0].image.shape == (channels, 8, 8)
    quant_model = QuantModel.build(model, "W4A8")
    assert quant_model.quantizers["0.input_quantizer"].fixed
    report = GenieM(iterations=3, batch_size=8, calibration_images=8).apply(quant_model, images, Rng(0))
    assert len(report.units) == 3
    if channels == 4 and isinstance(method, Noise):
        path = Onnx(preset="simulate").export(quant_model, tmp_path / "x.onnx")
        found = Onnx(preset="simulate").verify(quant_model, path, images)
        assert found["as_written"]["mean_error"] < 0.02 and found["images"] == 12
        opened = Onnx.open(path)
        assert opened.preprocess.channels == 4 and opened.run(torch.randn(2, 4, 8, 8)).shape == (2, 3)
