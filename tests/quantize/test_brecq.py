"""BRECQ's own: two phases, an untouched first layer, and the Fisher weighting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pytest
import torch
from tests.nn.networks import Keywords, Network, Upsampling, float_model
from tests.quantize.phases import a_phase
from torch import nn
from torch.nn import functional as F

from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.methods import MemoryBudget
from synthquant.models.signature import joined
from synthquant.nn.layers import QuantLayer
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import calibrate
from synthquant.quantize.brecq import Brecq
from synthquant.quantize.cache import RowCache, Stream
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.fisher import fisher_weights
from synthquant.quantize.reconstruct import Reconstruction
from synthquant.quantize.unit_fit import UnitFit


def images() -> ImageSet:
    pixels = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageSet.from_tensors(pixels, dtype="float16")


def quantize(network: nn.Module | None = None, scheme: str = "W3A4", **changes: Any) -> tuple[QuantModel, QuantReport]:
    model = QuantModel.build(float_model(network or Network()), scheme)
    fields = {"iterations": 12, "activation_iterations": 6, "batch_size": 5, "rounding_lr": 0.05, **changes}
    return model, Brecq(**fields).apply(model, images(), Rng(0))


def test_the_first_layer_keeps_nearest_rounding() -> None:
    model, report = quantize()
    assert report.units[0].steps == () and report.units[0].undecided is None
    assert report.units[4].steps == (), "the range of the image is known, not learned"
    assert report.units[5].steps != () and report.units[5].undecided is None, "step sizes are learned"
    plain = QuantModel.build(model.float_model, model.scheme)
    calibrate_weights(plain, "brecq")
    for name in ("stem", "blocks.0.conv1"):
        ours, nearest = model.layers[name].weight_quantizer, plain.layers[name].weight_quantizer
        assert ours is not None and nearest is not None
        assert torch.equal(ours.scale, nearest.scale), "weight scales are not learned"
        assert torch.equal(ours.codes, nearest.codes) == (name == "stem")


class TwoStems(nn.Module):
    """Its first block, and so its first unit, holds two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Stem(3), Stem(6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


class Stem(nn.Module):
    """Two convolutions, joined by a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.one(x))
        return torch.relu(y + self.two(y))


@pytest.mark.parametrize(
    ("network", "granularity", "first", "second"),
    [
        (Network, "network", "stem", "blocks.0.conv1"),
        (Network, "layer", "stem", "blocks.0.conv1"),
        (TwoStems, "block", "blocks.0.one", "blocks.0.two"),
    ],
)
def test_only_the_first_layer_is_left_out_whatever_the_first_unit_is(
    network: type[nn.Module], granularity: str, first: str, second: str
) -> None:
    model, report = quantize(network(), granularity=granularity, iterations=60, rounding_weight=0.1)
    assert model.units(granularity)[0].layers[:2] == ((first, second) if granularity != "layer" else (first,))  # type: ignore[arg-type]
    plain = QuantModel.build(model.float_model, model.scheme)
    calibrate_weights(plain, "brecq")
    learned = {name for name, layer in plain.layers.items() if not torch.equal(codes(layer), codes(model.layers[name]))}
    assert first not in learned and second in learned
    if granularity != "layer":
        assert report.units[0].steps != () and report.units[0].undecided is not None


def test_a_first_layer_that_stays_float_lets_the_second_learn() -> None:
    scheme = QuantScheme.parse({"preset": "W3A16", "ignore": ["stem"]})
    model = QuantModel.build(float_model(Network()), scheme)
    report = Brecq(iterations=12, batch_size=5, rounding_lr=0.2).apply(model, images(), Rng(0))
    assert report.units[0].layers == ("blocks.0.conv1",) and report.units[0].steps != ()


def codes(layer: QuantLayer) -> torch.Tensor:
    assert layer.weight_quantizer is not None
    return layer.weight_quantizer.codes


def test_weights_only_has_one_phase() -> None:
    _, report = quantize(scheme="W3A16")
    assert len(report.units) == 4


def test_the_second_phase_leaves_weights_alone() -> None:
    one, _ = quantize(activation_iterations=0)
    two, _ = quantize()
    for name, layer in one.layers.items():
        left, right = layer.weight_quantizer, two.layers[name].weight_quantizer
        assert left is not None and right is not None and torch.equal(left.codes, right.codes)
    assert any(not torch.equal(one.quantizers[name].scale, two.quantizers[name].scale) for name in one.quantizers)


def test_fisher_options_run_and_differ() -> None:
    losses = []
    for fisher in (None, "diagonal", "full"):
        _, report = quantize(Upsampling(), "W2A16", fisher=fisher)
        assert all(unit.loss_end is not None for unit in report.units)
        losses.append(report.units[2].losses)
    assert losses[0] != losses[1] != losses[2]


class Weights(NamedTuple):
    """Weights of a unit's error, and what the same chunk of images gives by plain autograd."""

    found: RowCache
    wanted: torch.Tensor


def fisher_of_each_unit(network: nn.Module, memory: MemoryBudget | None = None) -> Iterator[Weights]:
    """Go through the units as a phase does, without learning."""
    model = QuantModel.build(float_model(network), "W2A4")
    calibration = CalibrationSet(model, images())
    calibrate_weights(model, "minmax")
    calibrate_activations(model, calibration, 10, "minmax", quantized_weights=False)
    phase = a_phase(iterations=1, batch_size=5, rounding_lr=0.1, fisher="diagonal")
    engine = Reconstruction(model, calibration, "block", memory or MemoryBudget(host_gib=1), None)
    x = joined(list(calibration.batches())).tensors[0]
    teacher, student = Stream(), Stream()
    for index, unit in enumerate(engine.units):
        own = UnitFit(engine.fitted, index, phase)
        own.gather(teacher, student)
        done = {name for earlier in engine.units[: index + 1] for name in earlier.layers}
        with model.mode(weights=True, activations=False):
            own.update_fisher()
            assert own.weights is not None
            found = own.weights.rows[0]
            for name, layer in model.layers.items():
                layer.weights_enabled = name in done
            wanted = gradient_of(model, unit.name, x)
        yield Weights(found, wanted)
        if index in engine.fitted.replay.needed_after(index):
            own.keep_outputs()
            own.run_student()
            assert own.outputs is not None
            teacher.outputs[index], student.outputs[index] = own.targets, own.outputs


def gradient_of(model: QuantModel, unit: str, x: torch.Tensor) -> torch.Tensor:
    """Of the sum of all images' divergence from the float network, with respect to a unit's output."""
    seen: list[torch.Tensor] = []

    def cut(_: nn.Module, args: Any, output: Any) -> Any:
        tensor, *more = output if isinstance(output, tuple) else (output,)
        seen.append(tensor.detach().requires_grad_())
        return (seen[-1].clone(), *more) if more else seen[-1].clone()

    handle = model.module.get_submodule(unit).register_forward_hook(cut)
    wanted = F.softmax(model.float_model.logits(x).double(), 1)
    error = F.kl_div(F.log_softmax(model(x).double(), 1), wanted, reduction="sum")
    handle.remove()
    if not error.requires_grad:  # nothing reads it
        return torch.zeros_like(seen[0])
    (gradient,) = torch.autograd.grad(error, seen, materialize_grads=True)
    return gradient.abs()


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Distance of two tensors as a share of the second."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("network", [Network, Upsampling, Keywords])
@pytest.mark.parametrize("cache", ["float32", "float16"])
def test_fisher_is_the_gradient_of_the_output_error(
    network: type[nn.Module], cache: Literal["float32", "float16"]
) -> None:
    """Against the whole network run quantized up to and including the unit, and in floating point behind it."""
    for found, wanted in fisher_of_each_unit(network(), MemoryBudget(host_gib=1, cache_dtype=cache)):
        weights, shape = found.read(0, 10), (10, *[1] * (wanted.ndim - 1))
        size = wanted.flatten(1).square().mean(1).sqrt().view(shape).clamp(min=1e-30)
        shares = 1 + wanted / size
        shares /= shares.flatten(1).square().mean(1).sqrt().view(shape)
        assert off(weights, shares) < (1e-3 if cache == "float32" else 2e-2)
        assert float(weights.square().mean()) == pytest.approx(1, rel=1e-3), "the error keeps its size"
        assert torch.equal(found.gather(torch.tensor([7, 2])), weights[[7, 2]])


def test_fisher_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [weights.found.read(0, 10) for weights in fisher_of_each_unit(Network())]
    monkeypatch.setattr(calibrate, "_MOST_AT_ONCE", 1)
    for one, other in zip(whole, fisher_of_each_unit(Network()), strict=True):
        assert off(other.found.read(0, 10), one) < 1e-3
        assert float(one.std()) > 0.1, "weights differ"


def test_gradients_of_every_size_give_the_same_weights() -> None:
    """Those of images that the network is sure of are as small as 1e-30; where there are none, the error is plain."""
    gradient = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    wanted = fisher_weights(gradient)
    sizes = torch.tensor([1e-30, 1e-20, 1e-8, 1.0, 1e10, 0.0]).view(-1, 1, 1, 1)
    found = fisher_weights(gradient * sizes)
    assert torch.allclose(found[:5], wanted[:5], rtol=1e-5)
    assert torch.equal(found[5], torch.ones(2, 3, 3))
    assert torch.allclose(found.square().mean((1, 2, 3)), torch.ones(6))
    assert float(wanted.std()) > 0.2


def test_fisher_weighting_has_an_effect() -> None:
    """The weighted error falls, and other weights are rounded the other way: more than a few in a thousand."""
    learned = {}
    for fisher in (None, "diagonal", "full"):
        model, report = quantize(Upsampling(), "W3A16", fisher=fisher, iterations=80, rounding_weight=0.1)
        assert sum(unit.diverged for unit in report.units) <= 2
        learned[fisher] = torch.cat([codes(layer).flatten() for layer in model.layers.values()])
    for fisher in ("diagonal", "full"):
        changed = (learned[fisher] != learned[None]).float().mean()
        assert 0.01 < float(changed) < 0.5, fisher
