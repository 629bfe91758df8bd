"""FIMA-Q's Fisher matrix against plain autograd, the global-local error by hand, weights learned straight through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.nn.networks import Network, Upsampling, float_model
from tests.quantize.phases import a_phase
from tests.quantize.test_brecq import images
from torch.nn import functional as F

from synthquant.core.modules import get_module, hooked
from synthquant.core.progress import QUIET
from synthquant.core.rng import Rng
from synthquant.methods import MemoryBudget
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize import GenieM, QDrop
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.fima import FisherError
from synthquant.quantize.fisher import in_float
from synthquant.quantize.global_local import GlobalLocalError, global_local
from synthquant.quantize.learn import Phase
from synthquant.quantize.reconstruct import Reconstruction
from synthquant.quantize.unit_fit import UnitFit

BATCH = torch.tensor([7, 2, 3])


def at_units(phase: Phase, look: Callable[[UnitFit], None], network: type[Any] = Network) -> Reconstruction:
    """Look at each unit of a small network, quantized, before it is fitted."""
    model = QuantModel.build(float_model(network()), "W2A4")
    calibration = CalibrationSet(model, images())
    calibrate_weights(model, "minmax")
    calibrate_activations(model, calibration, 10, "minmax", quantized_weights=False)
    engine = Reconstruction(model, calibration, "block", MemoryBudget(host_gib=1), None)
    fit = UnitFit.fit

    def looking(self: UnitFit, rng: Rng, bar: Any) -> Any:
        with model.mode(weights=True, activations=True):
            look(self)
        return fit(self, rng, bar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitFit, "fit", looking)
        engine.run(phase, Rng(0), QUIET)
    return engine


def jointly(**changes: Any) -> Phase:
    return a_phase(iterations=1, batch_size=5, inputs="mixed", activations=True, quantize_probability=0.5, **changes)


def network_input(unit: UnitFit) -> torch.Tensor:
    (inputs,) = unit._fitted.gathered(torch.arange(10)).tensors
    return inputs


@pytest.mark.parametrize("network", [Network, Upsampling])
def test_the_fisher_matrix_is_measured_with_nothing_but_the_unit_quantized(network: type[Any]) -> None:
    found: list[tuple[torch.Tensor, ...]] = []

    def look(unit: UnitFit) -> None:
        fisher = FisherError(unit, Rng(0))
        fisher.measure()
        module, inputs, model = get_module(unit.model.module, unit.unit.name), network_input(unit), unit.model
        own = set(module.modules())
        layers = [layer for layer in model.layers.values() if layer not in own]
        quantizers = [quantizer for quantizer in model.quantizers.values() if quantizer not in own]
        caught: list[torch.Tensor] = []

        def catch(_: object, args: object, output: torch.Tensor) -> torch.Tensor:
            caught.append(output.detach().requires_grad_())
            return caught[-1].clone()

        with model.mode(weights=False, activations=False), torch.no_grad(), hooked([(module, catch)]):
            answer = model(inputs)
        with in_float([(layers, quantizers)]), hooked([(module, catch)]):
            other = model(inputs)
        wanted, quantized = caught
        one, two = F.log_softmax(other.double() / 20, 1), F.softmax(answer.double() / 20, 1)
        (gradient,) = torch.autograd.grad((two * (two.log() - one)).sum(), quantized)
        found.append((fisher.gradients[0], gradient.abs().double().flatten(1).mean(0)))
        found.append((fisher.distances[0], (quantized - wanted).abs().double().flatten(1).mean(0).detach()))

    at_units(jointly(fisher_rank=2), look, network)
    assert len(found) >= 6
    for ours, plain in found:
        assert float(plain.max()) > 0
        torch.testing.assert_close(ours, plain, rtol=0, atol=5e-3 * float(plain.max()))


def test_the_error_of_fima_is_that_of_its_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    error, gradients, distances = torch.rand(3, 3, 11, generator=generator).double().unbind(0)
    fisher = object.__new__(FisherError)
    fisher.gradients, fisher.distances = list(gradients * 1e-30), list(distances)
    fisher.weigh()
    gram = distances @ distances.T
    inverse = (gram + 1e-4 * gram.trace() / 3 * torch.eye(3)).inverse()
    along = error @ gradients.T
    low_ranks, diagonals = (
        torch.stack([torch.stack(fisher.terms(row[None].float())) for row in error]).double().unbind(1)
    )
    wanted = torch.stack([row @ inverse @ row for row in along])
    torch.testing.assert_close(low_ranks / low_ranks.sum(), wanted / wanted.sum(), rtol=1e-4, atol=0)
    wanted = (error.square() * gradients.mean(0)).sum(1)
    torch.testing.assert_close(diagonals / diagonals.sum(), wanted / wanted.sum(), rtol=1e-5, atol=0)
    whole = fisher.terms(error.float())
    assert [float(term) for term in whole] == pytest.approx([float(low_ranks.mean()), float(diagonals.mean())])
    fisher.distances = [distances[0]] * 3  # as parallel as rows can be
    fisher.weigh()
    assert all(bool(term.isfinite()) for term in fisher.terms(error.float()))


def test_fima_measures_at_steps_that_divide_the_phase_and_counts_from_there() -> None:
    def look(unit: UnitFit) -> None:
        fisher = FisherError(unit, Rng(0))
        measured = []
        with torch.no_grad():
            for step in range(12):
                value = float(fisher(BATCH))
                measured.append(len(fisher.gradients))
                assert value == pytest.approx(2, abs=1e-5) if step % 4 == 0 else value > 0
        assert measured == [1] * 4 + [2] * 4 + [3] * 4

    at_units(replace(jointly(fisher_rank=3), iterations=12), look)


@pytest.mark.parametrize("task", ["classify", "other"])
def test_global_and_local_errors_are_those_of_the_specification(task: str) -> None:
    units = []

    def look(unit: UnitFit) -> None:
        object.__setattr__(unit.model.float_model, "task", task)
        error_of, mixing = global_local(unit, Rng(0)), Rng(0).generator("mix")
        with torch.no_grad():
            assert float(error_of(BATCH)) == pytest.approx(3, abs=1e-5), "each divided by its first value"
            found = float(error_of(BATCH))  # other inputs are mixed in
        model, is_last = unit.model, "fc" in unit.unit.layers
        values = []
        for _ in range(2):
            seen: list[torch.Tensor] = []

            def catch(_: object, args: Any, seen: list[torch.Tensor] = seen) -> None:
                seen.append(args[0])

            with torch.no_grad():
                output = unit.output(BATCH, mixing)
                with hooked(pre=[(model.layers["fc"], catch)]):
                    answers = [unit.rest(BATCH, output), unit.float_answer(BATCH)]
            if task == "classify" and not is_last:
                answers = seen
            near = F.mse_loss(output[0], unit.targets.gather(BATCH)[0])
            values.append((float(F.mse_loss(answers[0], answers[1])), float(near)))
        (far, near), (far_then, near_then) = values
        assert found == pytest.approx(far_then / far + 2 * near_then / near, rel=1e-4)
        units.append(unit.unit.name)

    at_units(jointly(), look)
    assert len(units) == 4


def learned(error: str | None, **settings: Any) -> tuple[QuantModel, QuantModel, list[Any]]:
    """A network learned by Genie-M, one that is rounded to nearest on the same grids, and reports of units."""
    fields = {"iterations": 40, "batch_size": 5, "activation_lr": 1e-3, "error": error, **settings}
    model, nearest = (QuantModel.build(float_model(Network()), "W3A4") for _ in range(2))
    report = GenieM(**fields).apply(model, images(), Rng(0))
    calibrate_weights(nearest, "genie")
    return model, nearest, list(report.units)


@pytest.mark.parametrize("error", ["fima", "global_local"])
def test_both_errors_learn_weights_and_steps(error: str) -> None:
    # At 40 steps of global_local a unit stands at the edge: another processor's rounding decides whether it got worse.
    settings = {"weight_lr": 1e-3, "iterations": 80} if error == "global_local" else {"fisher_rank": 4}
    model, nearest, units = learned(error, **settings)
    assert not any(unit.diverged for unit in units)
    assert all(unit.losses[-1] < 2 * unit.losses[0] for unit in units)
    codes = scales = 0
    for name, layer in model.layers.items():
        ours, other = layer.weight_quantizer, nearest.layers[name].weight_quantizer
        assert ours is not None and other is not None and layer.weight_source is None
        codes += int((ours.codes != other.codes).sum())
        scales += int((ours.scale != other.scale).sum())
    assert codes > 0 and scales > 0
    assert all((unit.undecided is None) == (error == "global_local") for unit in units), "roundings, or weights"
    again, _, _ = learned(error, **settings)
    assert all(torch.equal(tensor, again.state()[name]) for name, tensor in model.state().items())


@pytest.mark.parametrize("error", ["fima", "global_local"])
def test_a_unit_is_put_back_if_the_error_that_it_minimised_got_worse(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"fima": FisherError, "global_local": GlobalLocalError}[error]
    judge, values = kind.judge, list[float]()

    def upside_down(self: Any, batch: torch.Tensor, output: Any) -> torch.Tensor:
        found: torch.Tensor = judge(self, batch, output)
        if torch.is_grad_enabled():
            return found
        values.append(float(found))
        return -found

    monkeypatch.setattr(kind, "judge", upside_down)
    settings = {"weight_lr": 1e-3} if error == "global_local" else {}
    model, nearest, units = learned(error, **settings)
    better = [one > other for one, other in zip(values[::2], values[1::2], strict=True)]
    assert [unit.diverged for unit in units] == better and any(better)
    for unit, put_back in zip(units, better, strict=True):
        for name in unit.layers if put_back else ():
            ours, other = model.layers[name].weight_quantizer, nearest.layers[name].weight_quantizer
            assert ours is not None and other is not None and torch.equal(ours.codes, other.codes)


def test_weights_learn_as_shares_of_their_range_and_stop_along_a_cosine() -> None:
    """At a rate that is next to nothing they round to nearest, at steps next to those that they began with."""
    model, nearest, _ = learned("global_local", weight_lr=1e-9, weight_scale_lr=1e-9)
    for name, layer in model.layers.items():
        ours, other = layer.weight_quantizer, nearest.layers[name].weight_quantizer
        assert ours is not None and other is not None and torch.equal(ours.codes, other.codes)
        torch.testing.assert_close(ours.scale, other.scale, rtol=1e-6, atol=0)


def test_what_is_off_is_not_written_and_settings_reach_the_phase() -> None:
    for method in (GenieM, QDrop):
        assert not {"error", "fisher_rank", "weight_lr"} & set(method().model_dump())
        assert method().phases()[0].error == "outputs" and method().phases()[0].weight_lr == 0
        (fima,) = method(error="fima").phases()
        assert (fima.error, fima.fisher_rank, fima.rounding_lr) == ("fima", 5, 1e-3)
        assert method(error="fima", fisher_rank=15).phases()[0].fisher_rank == 15
        (straight,) = method(error="global_local").phases()
        assert (straight.error, straight.rounding_lr, straight.rounding_weight) == ("global_local", 0, 0)
        assert straight.weight_lr == 1e-4 and straight.weight_scale_lr > 0
        assert replace(fima, error="outputs", fisher_rank=0) == method().phases()[0], "and nothing else"
        with pytest.raises(ValidationError, match="weight_lr is a setting of error=global_local"):
            method(error="fima", weight_lr=1e-3)
        with pytest.raises(ValidationError, match="fisher_rank is a setting of error=fima"):
            method(fisher_rank=5)
