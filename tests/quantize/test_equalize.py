"""Cross-layer equalisation: the float network stays what it is, ranges become even, and files bring it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.networks import Network, float_model
from tests.small_networks import small_images
from torch import Tensor, nn

from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.core.progress import Progress
from synthquant.core.rng import Rng
from synthquant.evaluate.agreement import measure_sqnr
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.export.onnx import Onnx
from synthquant.methods import Equalize
from synthquant.models.float_model import FloatModel
from synthquant.nn.equalization import ChannelClip, Equalization
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.bias_correction import correct_biases
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.equalize import equalized
from synthquant.quantize.rtn import Rtn


def convolution(
    inputs: int, outputs: int, kernel: int, activation: Callable[[], nn.Module], groups: int = 1
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        activation(),
    )


class Inverted(nn.Module):
    """Inverted residual with a linear bottleneck."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.expand = convolution(4, 8, 1, activation)
        self.depthwise = convolution(8, 8, 3, activation, groups=8)
        self.project = convolution(8, 4, 1, nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


class Mobile(nn.Sequential):
    """Like a MobileNetV2: two residual blocks, depthwise layers, clipped activations."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU6) -> None:
        head = (convolution(4, 6, 1, activation), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 5))
        blocks = (Inverted(activation), Inverted(activation))
        super().__init__(convolution(3, 8, 3, activation), convolution(8, 4, 1, nn.Identity), *blocks, *head)


class Joined(nn.Module):
    """Two branches side by side, pooled, then a linear layer that reads every position of every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = convolution(3, 4, 3, nn.ReLU), convolution(3, 3, 1, nn.LeakyReLU)
        self.both = convolution(7, 4, 1, nn.ReLU)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2)
        self.fc = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.cat((self.left(x), self.right(x)), 1), 2)
        return self.fc(nn.functional.avg_pool2d(torch.relu(self.up(self.both(x))), 2).flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobile": Mobile,
    "residual": Network,
    "joined": Joined,
    "hardtanh": lambda: Mobile(lambda: nn.Hardtanh(-1.0, 2.0, inplace=True)),
}


def lively(network: nn.Module) -> FloatModel:
    """Random weights, large enough for the logits to depend on the image; ReLUs cut within three deviations."""
    model = float_model(network, seed=2)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.mul_(4)
            elif isinstance(part, nn.BatchNorm2d):
                part.bias.copy_(torch.minimum(part.bias, 3 * part.weight.abs()))
    return model


def outputs(model: QuantModel | nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(model, QuantModel):
            with model.mode(weights=False, activations=False):
                return model(images)
        return model(images)


def made(
    network: nn.Module, kind: Equalize, scheme: str | dict[str, Any] = "W8A8"
) -> tuple[FloatModel, QuantModel, Equalization]:
    model = lively(network)
    quant_model = equalized(QuantModel.build(model, QuantScheme.parse(scheme)), kind, small_images())
    assert quant_model.equalization is not None
    return model, quant_model, quant_model.equalization


@pytest.mark.parametrize("kind", ["weights", "activations"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_equalised_network_computes_the_same(name: str, kind: Equalize) -> None:
    fingerprint = lively(NETWORKS[name]()).fingerprint
    model, quant_model, found = made(NETWORKS[name](), kind)
    assert model.fingerprint == fingerprint
    images = model.example_images(8, seed=1)
    expected = outputs(model.module, images)
    assert expected.std(0).min() > 0.01
    assert torch.allclose(outputs(quant_model, images), expected, rtol=1e-4, atol=1e-4)
    plain = QuantModel.build(model, "W8A8")
    changed = [
        n for n in plain.layers if not torch.allclose(plain.layers[n].float_weight, quant_model.layers[n].float_weight)
    ]
    around_clips = ["1.0", "2.expand.0", "2.project.0", "3.expand.0", "3.project.0", "4.0"]
    clipped = kind == "activations" and name in ("mobile", "hardtanh")
    assert changed == (
        around_clips if clipped else list(plain.layers)
    )  # every layer makes or reads channels that are not the image or the logits
    first, last = next(iter(plain.layers)), list(plain.layers)[-1]
    assert first not in found.columns and last not in found.rows


def test_all_that_writes_into_a_stream_or_reads_it_shares_scales_and_clips_take_them() -> None:
    _, quant_model, found = made(Mobile(), "weights")
    stream = found.columns["4.0"]
    assert stream.unique().numel() > 1
    for reader in ("2.expand.0", "3.expand.0"):
        assert torch.equal(found.columns[reader], stream)
    for writer in ("1.0", "2.project.0", "3.project.0"):
        assert torch.allclose(found.rows[writer] * stream, torch.ones(4))
    # a depthwise layer parts the scales before it from those behind
    assert torch.allclose(found.rows["2.expand.0"] * found.columns["2.depthwise.0"], torch.ones(8))
    assert not torch.allclose(found.columns["2.depthwise.0"], found.columns["2.project.0"])
    clip = quant_model.module.get_submodule("2.expand.2")
    assert torch.allclose(clip.high, 6 * found.rows["2.expand.0"]) and torch.equal(clip.low, torch.zeros(8))
    rows = {row.name: row for row in quant_model.coverage()}
    assert rows["2.expand.2"].kind == "ChannelClip" and "bound of its own" in rows["2.expand.2"].reason


def test_under_deploy_full_clips_keep_their_one_bound() -> None:
    _, quant_model, found = made(Mobile(), "weights", {"preset": "W8A8", "deploy": "full"})
    assert not found.bounds and set(found.rows) == {"1.0", "2.project.0", "3.project.0"}
    assert set(found.columns) == {"2.expand.0", "3.expand.0", "4.0"}
    assert not any(isinstance(part, ChannelClip) for part in quant_model.module.modules())


class Heard(Progress):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Pinned(nn.Module):
    """Everything that scales must not pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if index == 0 else 4, 4, 1) for index in range(7))
        self.gate = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.clip = nn.ReLU6()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g = self.layers
        x = b(nn.functional.silu(a(x)))
        x = d(c(x * self.gate) + 1.0)
        x = e(self.clip(x))
        x = g(self.clip(f(x.softmax(1))))  # the clip runs twice
        return self.fc(x.mean((2, 3)).abs())


def test_what_scales_cannot_pass_pins_them() -> None:
    model, heard = float_model(Pinned()), Heard()
    plain = QuantModel.build(model, "W8A8")
    assert equalized(plain, "activations", small_images(), heard) is plain
    assert "no channels can be scaled" in heard.warnings[0]
    assert equalized(plain, "none", small_images()) is plain


class Padded(nn.Module):
    """Pads with ones, which look like any other padding."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(nn.functional.pad(self.one(x), (1, 1, 1, 1), value=3.0)).mean((2, 3)))


def test_a_network_that_would_compute_something_else_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Padded: equalised it computes something else \(logits of \S+ differ by"
    ):
        made(Padded(), "weights")


class Chain(nn.Module):
    """Three layers, the last but one with a padded successor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.two, self.three = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.two(torch.relu(self.norm(self.one(x))))).mean((2, 3))


def test_weights_follow_the_equations_of_dfq() -> None:
    model, quant_model, found = made(Chain(), "weights")
    before = QuantModel.build(model, "W8A8").layers
    w1, w2, w3 = (quant_model.layers[name].float_weight for name in ("one", "two", "three"))
    for made_by, read_by in ((w1, w2), (w2, w3)):  # eq. 11: r1 = r2 = sqrt(r1 r2) at the end
        assert torch.allclose(made_by.abs().amax((1, 2, 3)), read_by.abs().amax((0, 2, 3)), rtol=1e-2)
    s = found.columns["one" if "one" in found.columns else "two"]
    r1, r2 = before["one"].float_weight.abs().amax((1, 2, 3)), before["two"].float_weight.abs()
    r2 = (r2 * found.rows["two"].view(-1, 1, 1, 1)).amax((0, 2, 3))
    assert torch.allclose(s, (r1 * r2).sqrt() / r2, rtol=1e-2)  # eq. 9
    assert torch.allclose(before["one"].float_weight / s.view(-1, 1, 1, 1), w1)  # eq. 7


def test_what_a_relu_hardly_ever_cuts_moves_into_the_next_bias() -> None:
    network = Chain()
    model = lively(network)
    with torch.no_grad():
        network.norm.weight.copy_(torch.tensor([0.5, -0.5, 0.1, 1.0, 0.2, 0.3]))
        network.norm.bias.copy_(torch.tensor([2.0, 2.0, 0.2, 2.0, -1.0, 1.0]))
    plain = QuantModel.build(model, "W8A8")
    quant_model = equalized(plain, "weights", small_images())
    found = quant_model.equalization
    assert found is not None and set(found.shifts) == {"one", "two"}  # three pads: its borders would be wrong
    rows = found.rows["one"]
    absorbed = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 0.1]) * rows  # max(0, beta - 3 gamma)
    bias = plain.layers["one"].bias * rows - absorbed
    assert torch.allclose(quant_model.layers["one"].bias, bias, atol=1e-6)
    into = quant_model.layers["two"].float_weight.flatten(1) @ absorbed
    assert torch.allclose(
        quant_model.layers["two"].bias, plain.layers["two"].bias * found.rows["two"] + into, atol=1e-5
    )


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_activations_follow_the_equation_of_smoothquant(strategy: str) -> None:
    scheme = {"preset": "W8A8", "weights": {"num_bits": 8, "strategy": strategy}}
    model, _, found = made(Chain(), "activations", scheme)
    plain, seen = QuantModel.build(model, "W8A8"), []
    hook = plain.layers["two"].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    (images,) = next(CalibrationSet(plain, small_images()).batches()).tensors
    outputs(plain, images)
    hook.remove()
    a, w = seen[0].abs().amax((0, 2, 3)), plain.layers["two"].float_weight.abs().flatten(1)
    w = w / (w.amax(1, keepdim=True) if strategy == "channel" else w.max())  # relative to what shares the grid
    expected = torch.where(a > 0, (a.clamp(min=a.max() / 8) / w.amax(0)).sqrt(), 1.0)
    assert torch.allclose(found.columns["two"], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["mobile", "joined"])
def test_a_checkpoint_brings_the_equalised_network_back(name: str, tmp_path: Path) -> None:
    model, quant_model, found = made(NETWORKS[name](), "weights" if name == "mobile" else "activations")
    Rtn(observer="minmax").apply(quant_model, small_images(), Rng(0))
    correct_biases(quant_model, small_images())
    save_checkpoint(quant_model, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model", float_model=model)
    images = model.example_images(4, seed=1)
    assert torch.equal(loaded(images), quant_model(images))
    assert loaded.equalization is not None and loaded.equalization.fingerprint == found.fingerprint
    assert measure_sqnr(loaded, small_images(), float_model=model) == measure_sqnr(quant_model, small_images())
    save_checkpoint(loaded, tmp_path / "again")
    for file in ("model.safetensors", "quant_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_an_exported_file_clips_each_channel(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    _, quant_model, _ = made(Mobile(), "weights")
    Rtn(observer="minmax").apply(quant_model, small_images(), Rng(0))
    exporter = Onnx(preset="simulate")
    path = exporter.export(quant_model, tmp_path / "model.onnx")
    assert exporter.verify(quant_model, path, small_images())["images"] == 12


def test_an_equalisation_of_another_network_is_refused() -> None:
    _, _, found = made(Mobile(), "weights")
    with pytest.raises(ModelError, match="equalisation does not fit"):
        QuantModel.build(float_model(Mobile(nn.ReLU)), "W8A8", found)
    with pytest.raises(ModelError, match=r"equalisation does not fit layer 1\.0"):
        QuantModel.build(float_model(Mobile()), "W8A8", Equalization(rows={"1.0": torch.ones(5)}))
