"""What each learned method asks of the engine, field by field, against what its paper or its authors' code says."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from tests.nn.networks import Network, float_model

from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.methods import QUANTIZERS
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize import rounding, rtn
from synthquant.quantize.learn import Phase
from synthquant.quantize.rounding import LearnedRounding

# Where a value comes from.
ADAROUND = "AdaRound, arXiv:2004.10568"
BRECQ = "BRECQ, arXiv:2102.05426"
QDROP = "QDrop, arXiv:2203.05740"
GENIE = "Genie, arXiv:2212.04780"
LSQ = "LSQ, arXiv:1902.08153"
Q_DIFFUSION = "Q-Diffusion, arXiv:2302.04304"

Field = tuple[Any, str]
"""A value and where it comes from."""

# Soft rounding is the same in all of them.
SOFT_ROUNDING: dict[str, Field] = {
    "name": ("weights", "names the pass"),
    "iterations": (20000, f"{BRECQ} section 4, code; {QDROP} section 5; {GENIE} code"),
    "batch_size": (32, f"{BRECQ} section 4; {GENIE}: rows of its permutation at 1,024 images"),
    "rounding_lr": (1e-3, f"{ADAROUND} code: Adam with its default rate, constant"),
    "rounding_weight": (0.01, f"{ADAROUND} eq. 21; {BRECQ} code, lambda for ResNets"),
    "warm_up": (0.2, f"{BRECQ} code: the regulariser sets in after a fifth of the steps"),
    "beta": ((20.0, 2.0), f"{ADAROUND} eq. 24 and section 4, annealed; {BRECQ} code, linear"),
}
# Of a pass over the units, unless the method says otherwise.
NOTHING_ELSE: dict[str, Field] = {
    "weight_scale_lr": (0.0, f"{ADAROUND} eq. 22: step sizes of weights are fixed"),
    "weight_lr": (0.0, f"{ADAROUND} eq. 22: roundings are learned, not weights"),
    "activation_scale_lr": (0.0, "not learned in this pass"),
    "quantize_probability": (1.0, "nothing is dropped"),
    "lsq_gradient_scale": (False, "step sizes are not learned, or without it"),
    "error": ("outputs", f"{ADAROUND} eq. 21: what the unit puts out"),
    "fisher_rank": (0, "not used: the error knows no Fisher matrix"),
    "norm": (2.0, f"{ADAROUND} eq. 21: squared Frobenius norm"),
    "fisher": (None, f"{BRECQ} code: all published commands use the plain squared error"),
    "calibrate_images": (None, "ranges are those set beforehand"),
    "unclipped_codes": (False, f"{ADAROUND} eq. 22: codes are clipped to the grid"),
    "skip_first_layer": (False, "every layer is learned"),
}


@dataclass(frozen=True)
class Ranges:
    """Activation ranges are set: on how many images, how they are searched, and whether weights are quantized."""

    count: int
    observer: str
    quantized_weights: bool


# What each method does in order, with its default settings.
PUBLISHED: dict[str, list[dict[str, Field] | Ranges]] = {
    "adaround": [
        Ranges(64, "genie", False),
        {
            **SOFT_ROUNDING,
            **NOTHING_ELSE,
            "observer": ("genie", "not used: no ranges are set in this pass"),
            "inputs": ("student", f"{ADAROUND} eq. 25: the asymmetric reconstruction, inputs of the quantized layers"),
            "activations": (False, f"{ADAROUND} section 5: activations are in floating point meanwhile"),
            "sampling": ("permutation", f"{BRECQ} code, which also holds AdaRound's: randperm at each step"),
        },
        Ranges(64, "genie", True),
    ],
    "brecq": [
        Ranges(64, "brecq", False),
        {
            **SOFT_ROUNDING,
            **NOTHING_ELSE,
            "observer": ("brecq", "not used: no ranges are set in this pass"),
            "inputs": ("student", f"{BRECQ} code, weights: asym=True"),
            "activations": (False, f"{BRECQ} code: act_quant=False while weights are learned"),
            "sampling": ("permutation", f"{BRECQ} code: randperm at each step"),
            "skip_first_layer": (True, f"{BRECQ} code: the first layer is not reconstructed"),
        },
        Ranges(64, "brecq", True),  # BRECQ code: ranges on 64 images after the weights are done
        {
            **NOTHING_ELSE,
            "observer": ("brecq", "not used: no ranges are set in this pass"),
            "name": ("activations", "names the pass"),
            "iterations": (5000, f"{BRECQ} code: iters_a"),
            "batch_size": (32, f"{BRECQ} code"),
            "inputs": ("teacher", f"{BRECQ} code, activations: asym is not set"),
            "activations": (True, f"{BRECQ} section 3.4: LSQ on the step sizes of activations"),
            "rounding_lr": (0.0, f"{BRECQ} code: weights are done"),
            "rounding_weight": (0.0, "weights are done"),
            "warm_up": (0.2, "not used: weights are done"),
            "beta": ((20.0, 2.0), "not used: weights are done"),
            "activation_scale_lr": (4e-4, f"{BRECQ} code: lr, Adam, cosine to 0"),
            "norm": (2.4, f"{BRECQ} code: p"),
            "sampling": ("permutation", f"{BRECQ} code: randperm at each step"),
        },
    ],
    "qdrop": [
        Ranges(256, "qdrop", False),  # QDrop code: observers see 256 images of the float network
        {
            **SOFT_ROUNDING,
            **NOTHING_ELSE,
            "observer": ("qdrop", "not used: no ranges are set in this pass"),
            "inputs": ("mixed", f"{QDROP} eq. 6 and code: what a block reads is mixed element by element"),
            "activations": (True, f"{QDROP} section 4: weights are tuned with activations quantized"),
            "activation_scale_lr": (4e-5, f"{QDROP} section 5, code: Adam, cosine to 0"),
            "quantize_probability": (0.5, f"{QDROP} section 5: probability of 0.5"),
            "lsq_gradient_scale": (True, f"{LSQ} section 2.2; {QDROP} code: grad_scale"),
            "sampling": ("replacement", f"{QDROP} code: randint"),
        },
    ],
    "genie_m": [
        Ranges(32, "genie", False),
        {
            **SOFT_ROUNDING,
            **NOTHING_ELSE,
            "observer": ("genie", f"{GENIE} code: 100 shares of the range"),
            "rounding_weight": (1.0, f"{GENIE} code: lambda"),
            "inputs": ("mixed", f"{GENIE} code: as QDrop"),
            "activations": (True, f"{GENIE} code: as QDrop"),
            "weight_scale_lr": (3e-3, "docs/adr/0011: the code's 1e-4 as a share of the folded step sizes"),
            "activation_scale_lr": (4e-5, f"{GENIE} code: Adam, cosine to 0"),
            "quantize_probability": (0.5, f"{GENIE} code: as QDrop"),
            "sampling": ("epoch", f"{GENIE} code: rows of one permutation"),
            "calibrate_images": (32, f"{GENIE} code: ranges are set anew at each unit"),
        },
    ],
    "q_diffusion": [
        Ranges(64, "minmax", False),  # Q-Diffusion code, CIFAR: ranges from the first 64 samples, to both ends
        {
            **SOFT_ROUNDING,
            **NOTHING_ELSE,
            "observer": ("minmax", "not used: no ranges are set in this pass"),
            "inputs": ("student", f"{Q_DIFFUSION} code, weights: asym=True"),
            "activations": (False, f"{Q_DIFFUSION} code: act_quant=False while weights are learned"),
            "sampling": ("steps", f"{Q_DIFFUSION} section 3.2: calibration data of all time steps"),
        },
        Ranges(64, "minmax", True),
        {
            **NOTHING_ELSE,
            "observer": ("minmax", "not used: no ranges are set in this pass"),
            "name": ("activations", "names the pass"),
            "iterations": (5000, f"{Q_DIFFUSION} code: cali_iters_a"),
            "batch_size": (32, f"{Q_DIFFUSION} code: 32 unless one is passed"),
            "inputs": ("teacher", f"{Q_DIFFUSION} code, activations: asym is not set"),
            "activations": (True, f"{Q_DIFFUSION} section 4.1: step sizes of activations are calibrated next"),
            "rounding_lr": (0.0, f"{Q_DIFFUSION} code: weights are done"),
            "rounding_weight": (0.0, "weights are done"),
            "warm_up": (0.2, "not used: weights are done"),
            "beta": ((20.0, 2.0), "not used: weights are done"),
            "activation_scale_lr": (4e-4, f"{Q_DIFFUSION} code: cali_lr, Adam, cosine to 0"),
            "norm": (2.4, f"{Q_DIFFUSION} code: cali_p"),
            "sampling": ("steps", f"{Q_DIFFUSION} section 3.2: calibration data of all time steps"),
        },
    ],
}  # fmt: skip
GRANULARITY = {
    "adaround": "layer",  # AdaRound section 4: layer by layer
    "brecq": "block",  # BRECQ section 3.2
    "qdrop": "block",  # QDrop code
    "genie_m": "block",  # Genie code
    "q_diffusion": "block",  # Q-Diffusion section 3.1
}


class Recorded:
    """Stands for the engine and for the calibration of activations: keeps what it is asked for, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Phase | Ranges] = []
        self.granularity: set[str] = set()
        recorded = self

        class Engine:
            class store:
                peak: dict[str, int] = {}  # noqa: RUF012

            def __init__(self, model: object, images: object, granularity: str, *rest: object) -> None:
                recorded.granularity.add(granularity)

            def run(self, phase: Phase, *rest: object) -> list[Any]:
                recorded.asked.append(phase)
                return []

        def calibrate(model: object, images: object, count: int, observer: str, *, quantized_weights: bool) -> None:
            recorded.asked.append(Ranges(count, observer, quantized_weights))

        monkeypatch.setattr(rounding, "Reconstruction", Engine)
        for module in (rounding, rtn):
            monkeypatch.setattr(module, "calibrate_activations", calibrate)

    def apply(self, name: str, scheme: str = "W4A4", **settings: Any) -> list[Phase | Ranges]:
        """Give what a method asks for."""
        pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        model = QuantModel.build(float_model(Network()), scheme)
        QUANTIZERS.get(name)(**settings).apply(model, ImageSet.from_tensors(pixels), Rng(0))  # type: ignore[call-arg]
        return self.asked


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def test_every_learned_method_has_its_table() -> None:
    learned = {name for name, method in QUANTIZERS.items() if issubclass(method, LearnedRounding)}  # type: ignore[arg-type]
    assert learned == set(PUBLISHED) == set(GRANULARITY)


@pytest.mark.parametrize("name", PUBLISHED)
def test_phases_are_those_of_the_paper(recorded: Recorded, name: str) -> None:
    asked = recorded.apply(name)
    assert recorded.granularity == {GRANULARITY[name]}
    assert [type(step) is Ranges for step in asked] == [type(step) is Ranges for step in PUBLISHED[name]]
    for found, published in zip(asked, PUBLISHED[name], strict=True):
        if isinstance(published, Ranges) or isinstance(found, Ranges):
            assert found == published
            continue
        assert set(published) == {field.name for field in fields(Phase)}, "a field without a source"
        for field, (value, source) in published.items():
            assert getattr(found, field) == value, f"{name}, {found.name}, {field}: {source}"


def test_nearest_rounding_sets_ranges_behind_quantized_weights(recorded: Recorded) -> None:
    (asked,) = recorded.apply("rtn")
    assert isinstance(asked, Ranges) and (asked.observer, asked.quantized_weights) == ("genie", True)


def test_settings_reach_the_phase(recorded: Recorded) -> None:
    settings: dict[str, Any] = {
        "granularity": "network", "iterations": 7, "batch_size": 3, "rounding_lr": 0.5, "rounding_weight": 0.25,
        "warm_up": 0.125, "beta_start": 9.0, "beta_end": 3.0, "observer": "minmax", "calibration_images": 5,
        "weight_scale_lr": 0.75, "activation_lr": 0.375, "quantize_probability": 0.625,
        "unclipped_codes": True,
    }  # fmt: skip
    ranges, phase = recorded.apply("genie_m", **settings)
    assert ranges == Ranges(5, "minmax", False) and isinstance(phase, Phase) and recorded.granularity == {"network"}
    found = {
        "granularity": "network", "iterations": phase.iterations, "batch_size": phase.batch_size,
        "rounding_lr": phase.rounding_lr, "rounding_weight": phase.rounding_weight, "warm_up": phase.warm_up,
        "beta_start": phase.beta[0], "beta_end": phase.beta[1], "observer": phase.observer,
        "calibration_images": phase.calibrate_images, "weight_scale_lr": phase.weight_scale_lr,
        "activation_lr": phase.activation_scale_lr, "quantize_probability": phase.quantize_probability,
        "unclipped_codes": phase.unclipped_codes,
    }  # fmt: skip
    assert found == settings
    recorded.asked.clear()
    (_, phase) = recorded.apply("qdrop", quantize_probability=0.75, activation_lr=0.5)
    assert isinstance(phase, Phase) and (phase.quantize_probability, phase.activation_scale_lr) == (0.75, 0.5)
    recorded.asked.clear()
    own = {"activation_iterations": 9, "activation_lr": 0.5, "activation_norm": 3.0, "batch_size": 4}
    *_, first, _, second = recorded.apply("brecq", fisher="full", **own)
    assert isinstance(first, Phase) and isinstance(second, Phase)
    assert (first.fisher, second.fisher, second.batch_size) == ("full", None, 4)
    assert (second.iterations, second.activation_scale_lr, second.norm) == (9, 0.5, 3.0)


@pytest.mark.parametrize(
    ("iterations", "rate"),
    [(40000, 1e-3), (20000, 1e-3), (5000, 4e-3), (1000, 0.02), (667, 0.03), (1, 0.03), (0, 0.03)],
)
def test_the_rounding_rate_follows_the_budget(recorded: Recorded, iterations: int, rate: float) -> None:
    """docs/adr/0006: 1e-3 * 20,000 / iterations, not below the papers' rate and at most 0.03."""
    *_, phase = recorded.apply("genie_m", iterations=iterations)
    assert isinstance(phase, Phase) and phase.rounding_lr == pytest.approx(rate, rel=1e-3)
    recorded.asked.clear()
    *_, literal = recorded.apply("genie_m", iterations=iterations, rounding_lr=0.01)
    assert isinstance(literal, Phase) and literal.rounding_lr == 0.01


def test_weights_alone_have_no_second_phase(recorded: Recorded) -> None:
    assert [type(step) for step in recorded.apply("brecq", "W4A16")] == [Ranges, Phase]
