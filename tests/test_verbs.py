"""The verbs in Python: what a command does, of what a program has in memory."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import synthquant as sq
from synthquant import make, verbs
from synthquant.recipe import SynthesizeSection

SIZE = {"input_size": 8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}
QUIET = {"progress": sq.Progress()}
PIXELS = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(3)).mul(255).to(torch.uint8)
LABELS = torch.arange(24) % 4


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stem = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        net = nn.Sequential(*stem, nn.Linear(8, 4))
        net(torch.rand(32, 3, 8, 8))
    return net


@pytest.fixture(scope="module")
def model() -> sq.FloatModel:
    return sq.FloatModel.from_module(network(), **SIZE)


@pytest.fixture(scope="module")
def quantized(model: sq.FloatModel) -> sq.QuantModel:
    return sq.quantize(model, PIXELS, method="rtn", **QUIET)


def same(first: sq.QuantModel, second: sq.QuantModel) -> bool:
    own, other = first.state(), second.state()
    return own.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in own.items())


def test_the_program_of_the_documentation(tmp_path: Path) -> None:
    """In a process of its own; the network is loaded in another one."""
    head = """
import torch, synthquant as sq
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 4)
    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
torch.manual_seed(0)
net = Net()
net(torch.rand(64, 3, 8, 8))
"""
    made = (
        head
        + f"""
model = sq.FloatModel.from_module(net, input_size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
images = sq.synthesize(model, count=16, iterations=2)
quant_model = sq.quantize(model, images, "W4A4", iterations=2)
print(quant_model)
print(sq.evaluate(quant_model, images)["count"])
quant_model.save({str(tmp_path / "quantized")!r})
print(quant_model(torch.ones(1, 3, 8, 8)).tolist())
"""
    )
    done = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=True)
    said, count, outputs = done.stdout.splitlines()
    assert said == (
        "QuantModel(Net, W4A4, ends w8a8; quantized: 2 of 2 layers, 100.0% of weights, 100.0% of multiply-adds)"
    )
    assert count == "16"
    assert "genie_d, 1 x 2 iterations: 2/2" in done.stderr and "evaluate quantized: 16/16" in done.stderr
    names: dict[str, Any] = {}
    exec(head, names)
    loaded = sq.load(tmp_path / "quantized", names["Net"]())
    assert loaded(torch.ones(1, 3, 8, 8)).tolist() == json.loads(outputs)


def test_the_lines_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.+?)```", readme, flags=re.DOTALL)[0]
    for number, fewer in (("count=256", "count=4"), ("iterations=500", "iterations=1"), ("=2000", "=1")):
        assert number in code
        code = code.replace(number, fewer)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"module": network(), "test_loader": DataLoader(TensorDataset(PIXELS, LABELS), 8)}
    exec(code, names)
    assert "QuantModel(Sequential, W4A8" in capsys.readouterr().out
    assert Path("quantized.onnx").is_file() and names["quant_model"].loaded


def test_images_are_those_of_the_command(model: sq.FloatModel, tmp_path: Path) -> None:
    section = SynthesizeSection.parse({"method": "zeroq", "count": 3, "iterations": 2}, "test")
    images = sq.synthesize(model, count=3, method="zeroq", iterations=2, **QUIET)
    assert isinstance(images, sq.ImageSet)
    on_disk = make.synthesize(model, section, 0, tmp_path / "command")
    kept = sq.synthesize(model, count=3, method="zeroq", iterations=2, folder=tmp_path / "kept", **QUIET)
    assert kept.fingerprint == on_disk.fingerprint  # type: ignore[union-attr]
    for index in range(3):
        assert torch.equal(images[index].image, on_disk[index].image)  # type: ignore[index]
    other = sq.synthesize(model, count=3, method="zeroq", iterations=2, seed=1, **QUIET)
    assert not torch.equal(images[0].image, other[0].image)  # type: ignore[index]


def test_a_network_is_quantized_as_by_the_command(tmp_path: Path) -> None:
    sq.ImageSet.from_tensors(PIXELS, LABELS).save(tmp_path / "images")
    recipe = {"model": "zoo/cifar10-resnet20", "images": {"source": str(tmp_path / "images")}, "device": "cpu"}
    sq.run(sq.Recipe.parse({**recipe, "quantize": {"method": "rtn", "scheme": "W5A5"}}), tmp_path / "run")
    ours = sq.quantize("zoo/cifar10-resnet20", str(tmp_path / "images"), "W5A5", "rtn", device="cpu", **QUIET)
    assert same(ours, sq.load(tmp_path / "run"))
    row = sq.evaluate(ours, (PIXELS, LABELS), **QUIET)
    again = sq.evaluate(tmp_path / "run", DataLoader(TensorDataset(PIXELS, LABELS), 5), device="cpu", **QUIET)
    assert {**row, "seconds": 0} == {**again, "seconds": 0}
    assert row["top1"] is not None and row["agreement"] is not None


@pytest.mark.parametrize(
    "images",
    [
        sq.ImageSet.from_tensors(PIXELS),
        PIXELS.float() / 255,
        PIXELS.permute(0, 2, 3, 1).numpy(),
        DataLoader(TensorDataset(PIXELS, LABELS), batch_size=7),
        TensorDataset(PIXELS.float() / 255, LABELS),
        [{"pixel_values": PIXELS, "labels": LABELS}],
        list(PIXELS.permute(0, 2, 3, 1).numpy()),
        (PIXELS, LABELS),
    ],
    ids=["set", "floats", "array", "loader", "dataset", "dictionaries", "arrays", "pair"],
)  # fmt: skip
def test_images_of_any_kind_quantize_alike(model: sq.FloatModel, quantized: sq.QuantModel, images: Any) -> None:
    assert same(sq.quantize(model, images, method="rtn", **QUIET), quantized)


def test_normalised_images_are_said_to_be(model: sq.FloatModel, quantized: sq.QuantModel) -> None:
    normal = model.preprocess.normalize(PIXELS.float() / 255)
    assert same(sq.quantize(model, normal, method="rtn", normalized=True, **QUIET), quantized)
    for wrong in (normal, PIXELS.float()):
        with pytest.raises(sq.DataError, match=r"pixels lie in 0..1: divide them by 255, or, .* normalized=True"):
            sq.quantize(model, wrong, method="rtn", **QUIET)
    row = sq.evaluate(model, (normal, LABELS), normalized=True, **QUIET)
    assert row["top1"] == sq.evaluate(model, (PIXELS, LABELS), **QUIET)["top1"]


def test_without_images_the_network_makes_its_own(model: sq.FloatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def made(network: sq.FloatModel, section: SynthesizeSection, seed: int, folder: Any, progress: Any) -> sq.ImageSet:
        asked.append((section.method, section.count, seed, folder))
        return sq.ImageSet.from_tensors(PIXELS)

    monkeypatch.setattr(make, "synthesize", made)
    sq.quantize(model, method="rtn", seed=7, **QUIET)
    assert asked == [("genie_d", 1024, 7, None)]


def test_a_network_that_takes_no_images_is_quantized_with_inputs(tmp_path: Path) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model = sq.FloatModel.from_module(net, example=x[:4])
    first = sq.quantize(model, x, method="rtn", **QUIET)
    parts = [sq.Inputs(args=(part,)) for part in x.split(5)]
    assert same(first, sq.quantize(model, parts, method="rtn", **QUIET))
    first.save(tmp_path / "model")
    with pytest.raises(
        sq.ModelError, match=r"takes no images; give synthquant.FloatModel.from_module\(module, example"
    ):
        sq.load(tmp_path / "model", net)
    assert torch.equal(sq.load(tmp_path / "model", model)(x), first(x))
    with pytest.raises(sq.DataError, match="takes inputs 0, and a list is none"):
        sq.quantize(model, [1, 2], method="rtn", **QUIET)


def test_a_checkpoint_of_a_module_needs_the_module(quantized: sq.QuantModel, tmp_path: Path) -> None:
    folder = quantized.save(tmp_path / "model")
    x = torch.randn(2, 3, 8, 8)
    other = network()
    nn.init.zeros_(other[0].weight)  # type: ignore[arg-type]
    for module, known in ((network(), True), (other, False)):
        loaded = sq.load(folder, module)
        assert torch.equal(loaded(x), quantized(x))
        assert (loaded.float_model.recorded_fingerprint == "") is known
        row = sq.evaluate(loaded, (PIXELS, LABELS), **QUIET)
        assert (row["agreement"] is not None) is known
    with pytest.raises(sq.ModelError, match=r"given in memory .* synthquant.load\(FOLDER, module\)"):
        sq.load(folder)
    with pytest.raises(sq.ModelError, match=r"no layer|not what"):
        sq.load(folder, nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()))


def test_files_are_written_and_verified(quantized: sq.QuantModel, tmp_path: Path) -> None:
    program = quantized.export(tmp_path / "model.pt2", **QUIET)
    x = torch.randn(3, 3, 8, 8)
    assert torch.allclose(torch.export.load(program).module()(x), quantized(x), atol=1e-5)
    with pytest.raises(sq.ModelError, match=r"name a file that ends in .onnx, .pt2"):
        quantized.export(tmp_path / "model.bin", **QUIET)
    with pytest.raises(sq.RecipeError, match="presett"):
        quantized.export(tmp_path / "model.onnx", presett="simulate", **QUIET)
    with pytest.raises(sq.SchemeError, match="ort-cpu"):
        quantized.export(tmp_path / "model.onnx", **QUIET)
    with pytest.raises(sq.ModelError, match=r"no name of a file for openvino; its suffix is '.onnx'"):
        quantized.export(tmp_path / "model.pt2", "openvino", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_a_target_says_the_scheme(model: sq.FloatModel, tmp_path: Path) -> None:
    quant_model = sq.quantize(model, PIXELS, method="rtn", target="tensorrt", **QUIET)
    assert quant_model.scheme.deploy == "full"
    quant_model.export(tmp_path / "model.onnx", "tensorrt", images=PIXELS, **QUIET)
    row = sq.evaluate(tmp_path / "model.onnx", (PIXELS, LABELS), **QUIET)
    assert (row["runtime"], row["count"]) == ("onnxruntime", 24)
    with pytest.raises(sq.UnknownNameError, match=r"tensort.*tensorrt"):
        sq.quantize(model, PIXELS, target="tensort", **QUIET)


def test_errors_are_one_line_before_any_work(model: sq.FloatModel, quantized: sq.QuantModel) -> None:
    with pytest.raises(sq.ModelError, match=r"memory/Sequential does not say how its images are prepared"):
        sq.quantize(network(), PIXELS, **QUIET)
    with pytest.raises(sq.RecipeError, match=r"iteratoins.*iterations"):
        sq.quantize(model, PIXELS, iteratoins=3, **QUIET)
    with pytest.raises(sq.UnknownNameError, match="genie_m"):
        sq.quantize(model, PIXELS, method="genie", **QUIET)
    with pytest.raises(sq.ModelError, match="is quantized already"):
        sq.quantize(quantized, PIXELS, **QUIET)  # type: ignore[arg-type]
    with pytest.raises(sq.ModelError, match="a list is no network"):
        sq.synthesize([], **QUIET)  # type: ignore[arg-type]
    with pytest.raises(sq.DataError, match="no labels"):
        sq.evaluate(model, PIXELS, **QUIET)


def test_packages_of_those_names_stay_packages() -> None:
    import synthquant.quantize.rtn

    assert synthquant.quantize.rtn.Rtn is sq.Rtn
    assert list(inspect.signature(sq.quantize).parameters)[:4] == ["model", "images", "scheme", "method"]
    assert "genie_d" in str(inspect.signature(sq.synthesize))
    code = "import synthquant.quantize.rtn, synthquant as sq; print(callable(sq.quantize), callable(sq.evaluate))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True True\n"


def test_older_names_work_and_say_what_they_are_called_now(quantized: sq.QuantModel, tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"synthquant.save_checkpoint is now QuantModel.save"):
        folder = sq.save_checkpoint(quantized, tmp_path / "model")
    with pytest.warns(DeprecationWarning, match=r"synthquant.load_checkpoint is now synthquant.load"):
        assert same(sq.load_checkpoint(folder, float_model=quantized.float_model), quantized)


def test_a_module_that_only_lends_its_architecture_is_not_judged(
    quantized: sq.QuantModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantized.save(tmp_path / "quantized")
    untrained = network()
    for part in untrained.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    assert same(sq.load(tmp_path / "quantized", untrained), quantized) and "untrained" not in caplog.text
    sq.FloatModel.from_module(untrained, **SIZE)
    assert "untrained" in caplog.text


def test_images_that_are_made_unasked_are_told(model: sq.FloatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(sq.Progress):
        lines: ClassVar[list[str]] = []

        def say(self, text: str) -> None:
            self.lines.append(text)

    monkeypatch.setattr(verbs, "synthesize", lambda *_, **__: sq.ImageSet.from_tensors(PIXELS))
    sq.quantize(model, method="rtn", progress=Told())
    assert any(
        line.startswith("no images are given: 1024 are made of Sequential alone by genie_d") for line in Told.lines
    )
    assert repr(sq.ImageSet.from_tensors(PIXELS)) == "ImageSet(24 images)"
