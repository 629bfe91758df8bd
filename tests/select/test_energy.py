from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.small_networks import small_float_model, small_images

from synthquant.core.rng import Rng
from synthquant.data.preprocess import model_inputs
from synthquant.select.energy import Energy, energy_score
from synthquant.select.sequence import run_filters


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_energy_is_its_formula(temperature: float) -> None:
    logits = torch.tensor([[1.0, 2.0, -3.0], [0.0, 0.0, 0.0]])
    expected = [-temperature * math.log(sum(math.exp(value / temperature) for value in row)) for row in logits.tolist()]
    assert energy_score(logits, temperature).tolist() == pytest.approx(expected, rel=1e-5)


def test_large_logits_do_not_overflow_and_the_order_of_classes_does_not_matter() -> None:
    logits = torch.tensor([[1e4, -1e4, 3.0]])
    assert energy_score(logits).item() == -1e4
    assert torch.equal(energy_score(logits), energy_score(logits.flip(1)))


def test_what_the_network_is_sure_of_has_low_energy_and_stays(tmp_path: Path) -> None:
    model, images = small_float_model(tmp_path), small_images(20)
    with torch.no_grad():
        energies = -torch.logsumexp(model.module(model_inputs(images, model.preprocess)), 1)
    selection = run_filters([Energy(keep=6)], images, model, Rng(0), batch_size=7)
    assert selection.steps[0].scores.tolist() == pytest.approx(energies.tolist(), rel=1e-5)
    assert selection.positions.tolist() == sorted(energies.argsort()[:6].tolist())
