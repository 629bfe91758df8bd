"""What the network behind a unit makes of it can be asked for at any step: an error that only this file knows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.quantize.phases import a_phase
from tests.quantize.test_brecq import Keywords, Network, Upsampling, float_model, images, off
from torch import nn
from torch.nn import functional as F

from synthquant.core.progress import QUIET
from synthquant.core.rng import Rng
from synthquant.methods import MemoryBudget
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, calibrate_activations, calibrate_weights
from synthquant.quantize.reconstruct import Reconstruction
from synthquant.quantize.unit_fit import UNIT_ERRORS, ErrorOf, UnitFit

NAME, EVERY = "prediction", 4
SEEN: list[dict[str, Any]] = []


def prediction(unit: UnitFit, rng: Rng) -> ErrorOf:
    """Distance of logits (in the way of PD-Quant), and of outputs with weights that are renewed now and then."""
    mixing = rng.generator("mix", unit.device)
    steps = itertools.count()

    def error_of(batch: torch.Tensor) -> torch.Tensor:
        step = next(steps)
        if step % EVERY == 0:
            unit.update_fisher()
            assert unit.weights is not None
            SEEN.append({"unit": unit.unit.name, "weights": unit.weights.read(0, 10)[0].clone()})
        output = unit.output(batch, mixing)
        distance = F.mse_loss(unit.rest(batch, output), unit.float_answer(batch))
        return unit.output_error(batch, output) + distance

    return error_of


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(UNIT_ERRORS, "_own", dict(UNIT_ERRORS._own))
    UNIT_ERRORS.register(NAME)(prediction)
    SEEN.clear()
    yield


def engine_of(network: nn.Module) -> Reconstruction:
    model = QuantModel.build(float_model(network), "W2A4")
    calibration = CalibrationSet(model, images())
    calibrate_weights(model, "minmax")
    calibrate_activations(model, calibration, 10, "minmax", quantized_weights=False)
    return Reconstruction(model, calibration, "block", MemoryBudget(host_gib=1), None)


def test_an_error_of_its_own_asks_for_fisher_and_rest_at_every_step() -> None:
    engine, phase = engine_of(Network()), a_phase(iterations=12, batch_size=5, rounding_lr=0.1, error=NAME)
    reports = engine.run(replace(phase, activations=True, fisher="diagonal"), Rng(0), QUIET)
    assert all(report.losses and report.undecided is not None for report in reports)
    units = {entry["unit"] for entry in SEEN}
    assert units == {report.name for report in reports}
    for name in units:
        weights = [entry["weights"] for entry in SEEN if entry["unit"] == name]
        assert len(weights) == 12 // EVERY
        is_last = name == reports[-1].name
        assert is_last or not torch.equal(weights[0], weights[-1]), "what was learned in between counts"
    assert not any(quantizer.learning for quantizer in engine.fitted.model.quantizers.values())
    again = engine_of(Network())
    first = [entry["weights"] for entry in SEEN]
    SEEN.clear()
    again.run(replace(phase, activations=True, fisher="diagonal"), Rng(0), QUIET)
    assert all(torch.equal(one, entry["weights"]) for one, entry in zip(first, SEEN, strict=True))


@pytest.mark.parametrize("network", [Network, Upsampling, Keywords])
def test_the_rest_is_the_float_network_behind_the_unit(network: type[nn.Module]) -> None:
    engine = engine_of(network())
    model, seen = engine.fitted.model, []
    phase = a_phase(iterations=1, batch_size=5, inputs="teacher")

    def looking(self: UnitFit, rng: Rng, bar: Any) -> Any:
        batch = torch.tensor([7, 2, 3])
        mixing = torch.Generator()
        with model.mode(weights=False, activations=False):
            output = [leaf.detach() for leaf in self.output(batch, mixing)]
        for leaf in output:
            if leaf.is_floating_point():
                leaf.requires_grad_()
        found = self.rest(batch, output)
        main = output[self.gives.main]
        (gradient,) = torch.autograd.grad(found.square().sum(), main, allow_unused=True)
        wanted = self.float_answer(batch)
        seen.append((off(found.detach(), wanted), gradient is not None and bool(gradient.any())))
        return fit(self, rng, bar)

    fit = UnitFit.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitFit, "fit", looking)
        engine.run(phase, Rng(0), QUIET)
    assert len(seen) == len(engine.units) and all(distance < 1e-3 for distance, _ in seen)
    assert any(reached for _, reached in seen)
