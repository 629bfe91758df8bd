"""ERQ: regression of weights on quantized inputs, rounding by halves with flips, for layers of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.damage import Warned
from tests.nn.networks import Encoder, Network, Upsampling, float_model
from torch import Tensor, nn

from synthquant.core.errors import DataError
from synthquant.core.modules import hooked
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.export.checkpoint import load_checkpoint, save_checkpoint
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import Erq, Rtn
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.erq import Grid, regress, round_by_halves, round_with_flips
from synthquant.quantize.moments import InputMoments, gather


def pictures(count: int = 24) -> ImageSet:
    """Smooth ones: neighbouring values resemble each other, so what a layer reads is correlated."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return ImageSet.from_tensors(nn.functional.interpolate(coarse, size=8, mode="bilinear"), dtype="float16")


def calibrated(network: nn.Module, scheme: Any = "W3A3") -> QuantModel:
    model = QuantModel.build(float_model(network), QuantScheme.parse(scheme))
    samples = CalibrationSet(model, pictures())
    calibrate_weights(model, "minmax")
    calibrate_activations(model, samples, 24, "minmax", quantized_weights=False)
    return model


def moments_of(model: QuantModel) -> dict[str, InputMoments]:
    return gather(model, CalibrationSet(model, pictures()), 24, list(model.layers))


def applied(network: nn.Module, scheme: Any = "W3A3", **options: Any) -> tuple[QuantModel, QuantReport]:
    model = QuantModel.build(float_model(network), QuantScheme.parse(scheme))
    return model, Erq(**{"ridge": 1e-3, **options.pop("settings", {})}).apply(model, pictures(), Rng(0), **options)


class Kinds(nn.Module):
    """Depthwise, without a bias, reflecting at the border, strided, and a linear layer on tokens without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.depthwise = nn.Conv2d(4, 8, 3, groups=4, padding=1, stride=2, padding_mode="reflect", bias=False)
        self.tokens = nn.Linear(8, 6, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.tokens(input=x.flatten(2).transpose(1, 2))).mean(1))


@torch.no_grad()
def errors(model: QuantModel) -> dict[str, float]:
    """Squared errors of the outputs on what layers read in the float network, summed over channels, by the layers."""
    found: dict[str, float] = {}

    def hook(name: str, layer: Any) -> Any:
        def run(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            quantizer = model.quantizers[model.reads[name]] if name in model.reads else None
            read = next(iter((*args, *kwargs.values())))
            layer.weights_enabled = True
            error = layer.forward(read if quantizer is None else quantizer.quantize(read)) - output
            layer.weights_enabled = False
            channels = error.shape[-1 if isinstance(layer, nn.Linear) else 1]
            found[name] = float(error.double().square().mean() * channels)

        return run

    hooks = [(layer, hook(name, layer)) for name, layer in model.layers.items()]
    with model.mode(weights=False, activations=False), hooked(hooks, with_kwargs=True):
        for batch in CalibrationSet(model, pictures()).batches(24):
            batch.call(model)
    return found


NETWORKS = [(Network, "W3A3"), (Upsampling, "W3A3"), (Kinds, "W3A3"), (Kinds, {"preset": "W4A4", "deploy": "full"})]
NETWORKS += [(Encoder, {"preset": "W3A3", "attention": {}}), (Kinds, "W3A16")]


@pytest.mark.parametrize(("network", "scheme"), NETWORKS)
def test_each_layer_gets_closer_to_the_float_layer(network: type[nn.Module], scheme: Any) -> None:
    model, report = applied(network(), scheme)
    rounded = QuantModel.build(float_model(network()), QuantScheme.parse(scheme))
    Rtn(calibration_images=24).apply(rounded, pictures(), Rng(0))
    found, nearest = errors(model), errors(rounded)
    for unit in report.units:
        assert unit.loss_end == pytest.approx(found[unit.name], rel=1e-3, abs=1e-9), "what is reported is measured"
        assert unit.loss_start and unit.loss_end is not None and unit.loss_end < unit.loss_start
    assert [unit.name for unit in report.units] == list(model.layers)
    assert sum(found.values()) < 0.9 * sum(nearest.values())
    without = {name for name, layer in model.layers.items() if layer.bias is None}
    assert without == ({"depthwise", "tokens"} if network is Kinds else set()), "a layer without a bias gets none"


@pytest.mark.parametrize("network", [Network, Upsampling, Kinds])
def test_the_correction_is_the_least_squares_solution(network: type[nn.Module]) -> None:
    """In layers without a bias the last column is corrected as the others, too."""
    model = calibrated(network())
    for moments in moments_of(model).values():
        correction = regress(moments, 0.01)
        start = moments.output_error(moments.weight)

        def cost(change: Tensor, moments: InputMoments = moments) -> float:
            penalty = 0.01 * float(change.square().sum())
            return moments.output_error(moments.weight + change) + penalty

        best = cost(correction)
        assert best < start
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            change = 1e-3 * torch.randn(correction.shape, generator=generator, dtype=torch.float64)
            assert cost(correction + change) > best
        assert float(correction[:, :, -1].abs().max()) > 0
        assert torch.allclose(
            correction @ (moments.gram + 0.01 * moments.rows * torch.eye(moments.gram.shape[1])), moments.cross
        )


def test_float_inputs_need_no_correction() -> None:
    for moments in moments_of(calibrated(Network(), "W3A16")).values():
        assert moments.error == 0 and float(regress(moments, 0.0).abs().max()) == 0


def test_the_regression_makes_up_for_quantized_inputs() -> None:
    """With eight-bit weights all of the error is that of three-bit inputs, which no rounding of weights lowers."""
    model, report = applied(Network(), "W8A3")
    ends, starts = ([getattr(unit, key) for unit in report.units] for key in ("loss_end", "loss_start"))
    assert sum(ends) < 0.9 * sum(starts)
    assert all(float((layer.bias - layer.float_bias).abs().max()) > 0 for layer in model.layers.values())


def problem() -> tuple[Tensor, Tensor, Grid]:
    """A weight of 2 groups of 6 rows and 10 columns, and strongly correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(2, 10, 10, generator=generator, dtype=torch.float64) + 1
    rows = mixing @ torch.randn(2, 10, 200, generator=generator, dtype=torch.float64)
    weight = torch.randn(2, 6, 10, generator=generator, dtype=torch.float64)
    return weight, rows @ rows.mT, Grid(torch.full_like(weight, 0.5), torch.full_like(weight, 3.0), 7)


def expected(error: Tensor, gram: Tensor) -> Tensor:
    return (error @ gram * error).sum(2)


def test_flips_lower_the_expected_error_until_none_does() -> None:
    weight, gram, grid = problem()
    nearest = round_with_flips(weight, grid, gram, 0)
    assert torch.equal(nearest, (weight / 0.5 + 3).round().clamp(0, 7))
    codes = round_with_flips(weight, grid, gram, 1000)
    least = expected(grid.decode(codes) - weight, gram)
    assert bool((least < 0.7 * expected(grid.decode(nearest) - weight, gram)).any())
    once = expected(grid.decode(round_with_flips(weight, grid, gram, 1)) - weight, gram)
    assert float(least.sum()) < float(once.sum()) < float(expected(grid.decode(nearest) - weight, gram).sum())
    ratio = weight / 0.5 + 3
    assert bool(((codes - ratio).abs() < 1).logical_or((ratio < 0) | (ratio > 7)).all()), "neighbours on the grid only"
    for column in range(10):
        for step in (-1, 1):
            other = codes.clone()
            other[:, :, column] += step
            allowed = ((other - ratio).abs() < 1)[:, :, column] & (other >= 0).all(2) & (other <= 7).all(2)
            assert bool((expected(grid.decode(other) - weight, gram) >= least - 1e-9)[allowed].all())


def test_columns_behind_make_up_for_those_that_are_rounded() -> None:
    weight, gram, grid = problem()
    moments = InputMoments.__new__(InputMoments)
    moments.gram, moments.rows, moments.has_bias = gram, 200, True
    with_bias = Grid(grid.scale[:, :, :9], grid.zero_point[:, :, :9], 7)
    codes, found = round_by_halves(weight, with_bias, moments, 0.0, 0)
    assert torch.equal(found[:, :, :9], with_bias.decode(codes)) and codes.shape[2] == 9
    first = with_bias.decode((weight[:, :, :9] / 0.5 + 3).round().clamp(0, 7))
    assert torch.equal(found[:, :, :5], first[:, :, :5]), "the first half is rounded as it was"
    plain = torch.cat([first, weight[:, :, 9:]], 2)
    assert float(expected(found - weight, gram).sum()) < 0.5 * float(expected(plain - weight, gram).sum())
    # the bias, which is never rounded, is the best one for what the rounded columns are
    slope = ((found - weight) @ gram)[:, :, 9]
    assert torch.allclose(slope, torch.zeros_like(slope), atol=1e-6)


def test_a_channel_that_is_never_seen_changes_nothing() -> None:
    network = Network()
    model = QuantModel.build(float_model(network), "W3A3")
    with torch.no_grad():
        model.module.get_submodule("blocks.0").conv1.weight[0].zero_()
    black = ImageSet.from_tensors(torch.full((4, 3, 8, 8), 0.5), dtype="float16")
    Erq(ridge=0).apply(model, black, Rng(0))
    assert all(bool(torch.isfinite(value.float()).all()) for value in model.state().values())


def test_killed_in_between_it_comes_to_the_same(tmp_path: Path) -> None:
    wanted, report = applied(Kinds(), workdir=tmp_path)
    files = sorted((tmp_path / "erq").iterdir())
    assert len(files) == 4
    for path in files[2:]:
        path.unlink()
    again, report_again = applied(Kinds(), workdir=tmp_path)
    assert all(torch.equal(value, again.state()[name]) for name, value in wanted.state().items())
    assert report_again.units[:2] == report.units[:2]
    with pytest.raises(DataError, match="units of another run"):
        applied(Kinds(), workdir=tmp_path, settings={"ridge": 0.5})


@torch.no_grad()
def test_it_is_saved_and_the_float_side_stays(tmp_path: Path) -> None:
    model, _ = applied(Kinds())
    loaded = load_checkpoint(save_checkpoint(model, tmp_path / "saved"), float_model=model.float_model)
    x = model.float_model.example_images(3)
    assert torch.equal(loaded(x), model(x))
    with model.mode(weights=False, activations=False):
        assert torch.equal(model(x), model.float_model.logits(x))


class Doubling(nn.Linear):
    """Does more than multiply by its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_layer_with_a_forward_of_its_own_is_rounded_and_named() -> None:
    network = Network()
    network.fc = Doubling(6, 5)
    progress = Warned()
    model, report = applied(network, progress=progress)
    assert progress.warnings == ["fc does more than multiply by its weight and is rounded to nearest"]
    assert report.units[-1].loss_end is None and model.layers["fc"].float_bias is None


def test_values_that_are_not_finite_are_refused() -> None:
    network = Network()
    model = QuantModel.build(float_model(network), "W4A16")
    with torch.no_grad():
        model.layers["stem"].float_weight[0] = float("inf")
    with pytest.raises(DataError, match=r"blocks\.0\.conv1 reads values that are not finite"):
        Erq().apply(model, pictures(), Rng(0))
