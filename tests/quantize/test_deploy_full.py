"""Networks quantized with `deploy: full`: calibrated, reconstructed, measured, saved and copied like any other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.nn.networks import Encoder, Keywords, Network, Upsampling, float_model
from tests.nn.test_placement import Gated, Tokens
from torch import nn

from synthquant.core.modules import get_module, hooked
from synthquant.core.progress import QUIET, Bar, Progress
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.evaluate.agreement import measure_sqnr
from synthquant.evaluate.cost import quantized_cost
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.methods import QUANTIZERS
from synthquant.models.signature import Inputs
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize.replay import Replay
from synthquant.quantize.rtn import Rtn

NETWORKS = (Network, Upsampling, Encoder, Keywords, Gated, Tokens)
FAST: dict[str, Any] = {"iterations": 24, "batch_size": 8, "rounding_lr": 5e-2, "calibration_images": 16}


def images(count: int = 16) -> ImageSet:
    pixels = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageSet.from_tensors(pixels, dtype="float16")


def built(network: nn.Module, scheme: str = "W4A4", **more: Any) -> QuantModel:
    return QuantModel.build(float_model(network), QuantScheme.parse({"preset": scheme, "deploy": "full", **more}))


def rounded(network: nn.Module, scheme: str = "W4A4", **more: Any) -> QuantModel:
    model = built(network, scheme, **more)
    Rtn(calibration_images=16, observer="minmax").apply(model, images(), Rng(0))
    return model


def inputs(model: QuantModel) -> torch.Tensor:
    """What the network was calibrated with."""
    pixels = torch.stack([images()[index].image for index in range(4)])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.float_model.preprocess.mean,
                                                            model.float_model.preprocess.std))  # fmt: skip
    return (pixels.float() - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
def test_sixteen_bits_are_as_good_as_float(network: type[nn.Module]) -> None:
    model = rounded(network(), "W8A8", input_activations={"num_bits": 16})
    x = inputs(model)
    wanted = model.float_model.module(x)
    with model.mode(weights=False, activations=True):
        found = model(x)
    assert not torch.equal(found, wanted)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    with model.mode(weights=False, activations=False):
        assert torch.allclose(model(x), wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
def test_checkpoints_and_copies_give_the_same_bits(tmp_path: Path, network: type[nn.Module]) -> None:
    model = rounded(network())
    x = inputs(model)
    wanted = model(x)
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "model"), float_model=model.float_model)
    assert torch.equal(loaded(x), wanted)
    found, state = loaded.state(), model.state()
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), wanted)
    for quantizer in twin.quantizers.values():
        quantizer.set_grid(quantizer.scale * 3, quantizer.zero_point)
    assert not torch.equal(twin(x), wanted) and torch.equal(model(x), wanted)


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("network", NETWORKS)
def test_units_alone_do_what_they_do_in_the_network(network: type[nn.Module], granularity: Any) -> None:
    model = rounded(network())
    x = inputs(model)
    units = model.units(granularity)
    with model.mode(weights=False, activations=False):
        replay = Replay(model.module, units, model.float_model.example_images(3))
    seen: dict[int, list[torch.Tensor]] = {}

    def keep(index: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            seen[index] = [leaf.clone() for leaf in replay.outputs[index].per_sample(output)]

        return hook

    with hooked([(get_module(model.module, unit.name), keep(index)) for index, unit in enumerate(units)]):
        model(x)
    for index in range(len(units)):
        leaves, _ = replay.run_to(
            index, len(x), Inputs.of(x.clone()), lambda unit: [leaf.clone() for leaf in seen[unit]]
        )
        output = replay.outputs[index].per_sample(replay.run_unit(index, leaves))
        assert all(torch.equal(one, other) for one, other in zip(output, seen[index], strict=True)), units[index].name


def learned(name: str, network: nn.Module, iterations: int = 24, **more: Any) -> tuple[QuantModel, QuantReport]:
    model = built(network, "W3A4")
    fields = {**FAST, "iterations": iterations, **({"activation_iterations": 12} if name == "brecq" else {})}
    return model, QUANTIZERS.get(name)(**fields).apply(model, images(), Rng(0), **more)  # type: ignore[call-arg]


@pytest.mark.parametrize("network", [Network, Tokens])
def test_reconstruction_lowers_the_error(network: type[nn.Module]) -> None:
    model, report = learned("genie_m", network(), iterations=80)
    gains = [unit.loss_end / unit.loss_start for unit in report.units if unit.loss_end and unit.loss_start]
    assert min(gains) < 0.95 and len(report.diverged) <= len(report.units) / 2
    start = built(network(), "W3A4")
    QUANTIZERS.get("genie_m")(**{**FAST, "iterations": 0}).apply(start, images(), Rng(0))  # type: ignore[call-arg]
    moved = {name for name, quantizer in model.quantizers.items() if quantizer.scale != start.quantizers[name].scale}
    assert moved & {"blocks.0.relu_0", "block.softmax_0"}, "the scales of operations inside units are learned too"
    assert model.calibrated and not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(quantizer.learning for quantizer in model.quantizers.values())


@pytest.mark.parametrize("name", ["qdrop", "brecq", "adaround"])
def test_the_other_methods_run(name: str) -> None:
    model, report = learned(name, Network())
    assert model.calibrated and len(report.diverged) < len(report.units)


class Inverted(nn.Module):
    """A block as MobileNetV2's: its activations clip in place, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(8, 16, 1), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(inplace=True), nn.Conv2d(16, 8, 1)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut: torch.Tensor = x + self.conv(x)
        return shortcut


class Clipping(nn.Sequential):
    """A network of such a block."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        stem, head = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8, 5))
        super().__init__(stem, Inverted(), head)


@pytest.mark.parametrize("name", ["genie_m", "qdrop"])
def test_networks_whose_activations_clip_in_place_learn(name: str) -> None:
    model, report = learned(name, Clipping(), iterations=40)
    assert {"1.conv.hardtanh_0", "1.conv.hardtanh_1"} <= model.quantizers.keys()
    assert len(report.diverged) < len(report.units) and model.calibrated


class Killed(Exception):
    """What the process dies of."""


class Killing(Progress):
    """Dies after a number of steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        yield _KillingBar(title, total, self)


class _KillingBar(Bar):
    def __init__(self, title: str, total: int, progress: Killing) -> None:
        super().__init__(title, total)
        self._progress = progress

    def advance(self, steps: int = 1, **fields: float | str) -> None:
        super().advance(steps, **fields)
        self._progress.left -= steps
        if self._progress.left <= 0:
            raise Killed


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    wanted, _ = learned("genie_m", Network(), progress=QUIET)
    with pytest.raises(Killed):
        learned("genie_m", Network(), progress=Killing(40), workdir=tmp_path)
    assert list(tmp_path.rglob("unit-*"))
    found, _ = learned("genie_m", Network(), workdir=tmp_path)
    one, other = wanted.state(), found.state()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("network", [Network, Gated, Tokens])
def test_ratios_of_layers_and_cost(network: type[nn.Module]) -> None:
    model = rounded(network(), "W8A8")
    rows = measure_sqnr(model, images(8))
    assert [row.name for row in rows] == list(model.layers)
    for row in rows:
        assert row.weights is not None and row.weights > 20
        assert row.activations is None or row.activations > 20
        assert row.alone is not None and row.cumulative is not None and row.cumulative > 5
    assert sum(row.activations is not None for row in rows) >= len(rows) - 1
    layers_only = QuantScheme.parse({"preset": "W8A8", "attention": None})
    papers = quantized_cost(QuantModel.build(model.float_model, layers_only)).bit_operations
    attention = sum(row.macs for row in model.coverage() if row.kind == "matmul")  # in float there
    assert (attention > 0) == (network is Tokens)
    assert quantized_cost(model).bit_operations == papers - attention * (32 * 32 - 8 * 8)


def test_the_output_s_grid_leaves_room_for_surer_answers() -> None:
    model = rounded(Network(), "W8A8")
    quantizer = model.quantizers["fc.output_quantizer"]
    with torch.no_grad(), model.mode(weights=True, activations=False):
        logits = model(inputs(model))
    low, high = (float((code - quantizer.zero_point) * quantizer.scale) for code in (0, quantizer.quant_max))
    assert high >= 1.9 * float(logits.max()) and low <= 1.9 * float(logits.min())
