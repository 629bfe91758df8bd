"""What each method of inversion asks of the common loop, field by field, against its paper or its authors' code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from synthquant.core.rng import Rng
from synthquant.methods import SYNTHESIZERS
from synthquant.models.float_model import FloatModel
from synthquant.synthesize import dsg, genie_d, pixels, zeroq
from synthquant.synthesize.correlation import Correlation
from synthquant.synthesize.dsg import DSG
from synthquant.synthesize.inversion import ExponentialSchedule, InvertedNetwork, Learner, PlateauSchedule

GENIE = "Genie, arXiv:2212.04780"
ZEROQ = "ZeroQ, arXiv:2001.00281"
DSG_PAPERS = "DSG, arXiv:2103.01049 and arXiv:2109.00212"

Field = tuple[Any, str]
"""A value and where it comes from."""

PUBLISHED: dict[str, dict[str, Field]] = {
    "genie_d": {
        "batch_size": (128, f"{GENIE} section 5, code"),
        "iterations": (4000, f"{GENIE} section 5, code"),
        "statistics": ("batch", f"{GENIE} eq. 3, code: over batch and positions"),
        "channel_weights": ("mean", f"{GENIE} code: mse_loss"),
        "swing": (True, f"{GENIE} section 3.1: swing convolution"),
        "epsilon": (0.0, f"{GENIE} code: std without it; with it for the running variance"),
        "rates": ([0.1, 0.01], f"{GENIE} code, effective: latents, generator"),
        "schedules": (
            [("plateau", 100, 0.1, 1e-4), ("exponential", 0.95, 100)],
            f"{GENIE} code: ReduceLROnPlateau of the latents, 0.95 every 100 steps of the generator",
        ),
    },
    "zeroq": {
        "batch_size": (32, f"{ZEROQ} section 4, code"),
        "iterations": (500, f"{ZEROQ} code"),
        "statistics": ("image", f"{ZEROQ} code: over positions"),
        "channel_weights": ("sum", f"{ZEROQ} eq. 3: squared norms"),
        "swing": (False, "belongs to Genie"),
        "epsilon": (1e-6, f"{ZEROQ} code: under both square roots"),
        "rates": ([0.5], f"{ZEROQ} code"),
        "schedules": ([("plateau", 100, 0.1, 1e-4)], f"{ZEROQ} code: ReduceLROnPlateau"),
    },
    "dsg": {
        "batch_size": (64, f"{DSG_PAPERS}, readme"),
        "iterations": (500, f"{DSG_PAPERS}, code"),
        "statistics": ("image", f"{DSG_PAPERS}: those of ZeroQ"),
        "channel_weights": ("sum", f"{DSG_PAPERS}: squared norms"),
        "swing": (False, "belongs to Genie"),
        "epsilon": (1e-6, f"{ZEROQ} code: under both square roots"),
        "rates": ([0.9], f"{DSG_PAPERS}, code"),
        "schedules": ([("plateau", 260, 0.1, 1e-4)], f"{DSG_PAPERS}, code: ReduceLROnPlateau"),
    },
}


def described(schedule: object) -> tuple[Any, ...]:
    if isinstance(schedule, PlateauSchedule):
        return ("plateau", schedule.patience, schedule.factor, schedule.minimum)
    assert isinstance(schedule, ExponentialSchedule)
    return ("exponential", schedule.factor, schedule.every)


def asked(monkeypatch: pytest.MonkeyPatch, name: str, model: FloatModel) -> dict[str, Any]:
    """What a method with its default settings asks for the first batch."""
    method = SYNTHESIZERS.get(name)()
    found: dict[str, Any] = {}
    given: dict[str, Any] = {"epsilon": 0.0}

    def network(*args: Any, **options: Any) -> InvertedNetwork:
        given.update(options)
        return InvertedNetwork(*args, **options)

    def invert(_: object, make_images: Callable[[], torch.Tensor], learners: Sequence[Learner], **rest: Any) -> Any:
        groups = [learner.optimizer.param_groups[0] for learner in learners]
        assert all(group["lr"] is learner.schedule.rate for group, learner in zip(groups, learners, strict=True))  # type: ignore[attr-defined]
        found["rates"] = [pytest.approx(float(group["lr"])) for group in groups]
        found["schedules"] = [described(learner.schedule) for learner in learners]
        found["iterations"] = rest["iterations"]
        images = make_images().detach()
        found.setdefault("batch_size", len(images))
        return images

    for module in (genie_d, zeroq, dsg):
        monkeypatch.setattr(module, "InvertedNetwork", network)
    for module in (genie_d, pixels):
        monkeypatch.setattr(module, "invert", invert)
    method.synthesize(model, 130, Rng(0))
    return found | {key: given[key] for key in ("statistics", "channel_weights", "swing", "epsilon")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_inversion_is_that_of_the_paper(monkeypatch: pytest.MonkeyPatch, tiny: FloatModel, name: str) -> None:
    found = asked(monkeypatch, name, tiny)
    assert found.keys() == PUBLISHED[name].keys(), "a field without a source"
    for field, (value, source) in PUBLISHED[name].items():
        assert found[field] == value, f"{name}, {field}: {source}"


def test_the_parts_of_dsg_are_on_and_the_priors_of_its_code_are_off() -> None:
    method = DSG()
    assert method.slack is not None and method.layer_enhancement and method.correlation is not None
    assert (method.slack.percentile, method.slack.per, method.slack.samples) == (0.9, "layer", 1024)
    assert method.correlation == Correlation(eigenvalues=10, eigenvectors=0), "the code's 1e-4 and 1 change nothing"
    assert method.cross_entropy == method.total_variation == method.image_norm == 0


@pytest.mark.parametrize("fall", [0.5e-4, 0.9e-4, 1.1e-4, 2e-4])
def test_progress_on_the_plateau_is_what_torch_takes_for_it(fall: float) -> None:
    """A loss that falls by less than 1e-4 of its best has not fallen."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=1e-4, patience=0)
    rate = torch.tensor(0.1, dtype=torch.float64)
    schedule = PlateauSchedule(rate, patience=0)
    for iteration in range(1, 12):
        loss = (1 - fall) ** iteration
        reference.step(loss)
        schedule.step(torch.tensor(loss, dtype=torch.float64), iteration)
    assert float(rate) == pytest.approx(optimizer.param_groups[0]["lr"])
    assert (float(rate) == pytest.approx(0.1)) == (fall > 1e-4)
