"""Each learned method against a slow one that follows its paper step by step, with the same batches and masks.

The losses of all steps, the gradients and values of step sizes and the codes that come out are compared, so a part that
is left out, swapped or put in shows; that the comparison would see each part is shown too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tests.nn.networks import float_model
from tests.quantize.slow_methods import LEARNS, READS, FourUnits, Pass, SlowMethod, Trace

from synthquant.core.progress import Bar, Progress
from synthquant.core.quant_report import QuantReport
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.methods import QUANTIZERS
from synthquant.nn import activation_quantizers
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme
from synthquant.quantize import calibrate, learn, unit_fit

BITS = (2, 3)
COUNT, RANGES_ON, STEPS = 10, 3, 12
COMMON: dict[str, Any] = {
    "granularity": "layer", "iterations": STEPS, "batch_size": 4, "rounding_lr": 0.1, "rounding_weight": 0.02,
    "observer": "minmax", "calibration_images": RANGES_ON,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "adaround": {},
    "brecq": {"activation_iterations": STEPS, "activation_lr": 4e-3},
    "qdrop": {"activation_lr": 4e-3, "quantize_probability": 0.25},
    "genie_m": {"activation_lr": 4e-3, "quantize_probability": 0.25, "weight_scale_lr": 3e-2},
}
ROUNDING = {"iterations": STEPS, "rounding_lr": 0.1, "rounding_weight": 0.02}


@dataclass
class Drawn:
    """What the package drew and what it showed while it learned."""

    batches: list[torch.Tensor] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    probabilities: set[float] = field(default_factory=set)
    gradients: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    steps: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)


@dataclass
class Result:
    model: QuantModel
    report: QuantReport
    drawn: Drawn


class Watching(Progress):
    """Reads the step sizes and their gradients after each step."""

    def __init__(self, model: QuantModel, drawn: Drawn) -> None:
        self._model, self._drawn = model, drawn

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        model, drawn = self._model, self._drawn

        class Each(Bar):
            def advance(self, steps: int = 1, **fields: float | str) -> None:
                for name, quantizer in model.quantizers.items():
                    if quantizer.scale.grad is not None and "unit" in fields:
                        at = (title, str(fields["unit"]), name)
                        drawn.gradients.setdefault(at, []).append(float(quantizer.scale.grad))
                        drawn.steps.setdefault(at, []).append(float(quantizer.scale.detach()))

        yield Each(title, total)


def pixels() -> torch.Tensor:
    return torch.rand(COUNT, 3, 6, 6, generator=torch.Generator().manual_seed(0)).half()


def quantize(name: str) -> Result:
    drawn = Drawn()
    batches, random_keep = learn.batches, unit_fit.random_keep

    def kept_batches(*args: Any) -> Iterator[torch.Tensor]:
        for batch in batches(*args):
            drawn.batches.append(batch)
            yield batch

    def kept_mask(like: torch.Tensor, probability: float, generator: torch.Generator | None) -> torch.Tensor:
        drawn.probabilities.add(probability)
        drawn.masks.append(random_keep(like, probability, generator))
        return drawn.masks[-1]

    scheme = QuantScheme.parse({"preset": f"W{BITS[0]}A{BITS[1]}", "ends": "same"})
    model = QuantModel.build(float_model(FourUnits(), size=6), scheme)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn, "batches", kept_batches)
        patch.setattr(unit_fit, "random_keep", kept_mask)
        patch.setattr(activation_quantizers, "random_keep", kept_mask)
        method = QUANTIZERS.get(name)(**COMMON, **OWN[name])  # type: ignore[call-arg]
        data = ImageSet.from_tensors(pixels(), dtype="float16")
        report = method.apply(model, data, Rng(0), progress=Watching(model, drawn))
    return Result(model, report, drawn)


@functools.cache
def result_of(name: str) -> Result:
    return quantize(name)


Change = Callable[[Pass], Pass]


def slow(name: str, result: Result, change: Change = lambda one: one) -> tuple[SlowMethod, dict[str, dict[str, Trace]]]:
    """What the paper's method does with the batches and masks of a result, or a variant of it."""
    network = float_model(FourUnits(), size=6).module
    images = (pixels().float() - 0.5) / 0.25
    method = SlowMethod(network, images, BITS, result.drawn.batches, result.drawn.masks)
    learned = Pass(STEPS, "student", False, rounding_lr=0.1, rounding_weight=0.02)
    mixed = replace(learned, inputs="mixed", activations=True, activation_lr=4e-3, keep=0.25)
    method.set_ranges(RANGES_ON, quantized_weights=False)
    if name == "adaround":
        traces = {"weights": method.learn(change(learned))}
        method.set_ranges(RANGES_ON, quantized_weights=True)
    elif name == "brecq":
        traces = {"weights": method.learn(change(replace(learned, nearest=("stem",))))}
        method.set_ranges(RANGES_ON, quantized_weights=True)
        traces["activations"] = method.learn(change(Pass(STEPS, "teacher", True, activation_lr=4e-3, norm=2.4)))
    elif name == "qdrop":
        traces = {"weights": method.learn(change(replace(mixed, lsq_scale=True)))}
    else:
        genie = replace(mixed, weight_step_lr=3e-2, calibrated_on=RANGES_ON)
        traces = {"weights": method.learn(change(genie))}
    return method, traces


def numbers(traces: dict[str, dict[str, Trace]]) -> dict[str, list[float]]:
    """Everything that was seen of the slow method, by phase, unit and what it is."""
    found = {}
    for phase, units in traces.items():
        for name, trace in units.items():
            found[f"{phase} {name} losses"] = trace.losses
            found[f"{phase} {name} before and after"] = [trace.loss_start, trace.loss_end]
            if trace.gradients:
                found[f"{phase} {name} gradients"] = trace.gradients
                found[f"{phase} {name} steps"] = trace.steps
    return found


def shown(result: Result) -> dict[str, list[float]]:
    """The same of the package's method."""
    found = {}
    phases = ["weights"] * len(READS) + ["activations"] * len(READS)
    for phase, unit in zip(phases, result.report.units, strict=False):
        assert unit.loss_start is not None and unit.loss_end is not None
        found[f"{phase} {unit.name} losses"] = list(unit.losses)
        found[f"{phase} {unit.name} before and after"] = [unit.loss_start, unit.loss_end]
    for kind, values in (("gradients", result.drawn.gradients), ("steps", result.drawn.steps)):
        for (phase, unit_name, quantizer), seen in values.items():
            assert quantizer == f"{unit_name}.input_quantizer", "a unit learns what it alone reads, or reads first"
            found[f"{phase} {unit_name} {kind}"] = seen
    return found


def deviation(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> float:
    """The largest relative difference."""
    return max(
        abs(a / b - 1) for key, values in wanted.items() for a, b in zip(found[key], values, strict=True) if b != 0
    )


@pytest.mark.parametrize("name", OWN)
def test_every_step_is_the_paper_s(name: str) -> None:
    result = result_of(name)
    method, traces = slow(name, result)
    found, wanted = shown(result), numbers(traces)
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, rel=2e-4, abs=1e-7), key
    for unit in READS:
        quantizer = result.model.layers[unit].weight_quantizer
        assert quantizer is not None
        assert torch.equal(quantizer.codes.float(), method.codes[unit]), unit
        torch.testing.assert_close(quantizer.scale.flatten(), method.grid[unit].step.flatten(), rtol=1e-4, atol=0)
    for unit, tensor in LEARNS.items():
        scale = result.model.quantizers[f"{unit}.input_quantizer"].scale
        torch.testing.assert_close(scale.detach(), method.read[tensor].step.detach(), rtol=1e-4, atol=0)
    assert next(method.masks, None) is None and next(method.batches, None) is None, "all that was drawn was used"


@pytest.mark.parametrize("name", ["qdrop", "genie_m"])
def test_masks_are_fresh_and_as_often_the_quantized_value_as_asked(name: str) -> None:
    drawn = result_of(name).drawn
    assert drawn.probabilities == {0.25}
    # A mixture for each unit and step, and a mask for each of the two step sizes that are learned.
    assert len(drawn.masks) == STEPS * (len(READS) + len(LEARNS))
    kept = torch.cat([mask.flatten() for mask in drawn.masks])
    assert set(kept.unique().tolist()) == {0.0, 1.0} and float(kept.mean()) == pytest.approx(0.25, abs=0.01)
    assert len({(mask.shape, tuple(mask.flatten().tolist())) for mask in drawn.masks}) == len(drawn.masks)


PARTS: list[tuple[str, str, Change]] = [
    ("adaround", "inputs of the quantized network", lambda one: replace(one, inputs="teacher")),
    ("adaround", "floating-point activations", lambda one: replace(one, activations=True)),
    ("adaround", "warm-up of the regulariser", lambda one: replace(one, without="warm-up")),
    ("adaround", "regulariser", lambda one: replace(one, rounding_weight=0.0)),
    ("adaround", "annealing", lambda one: replace(one, beta=(2.0, 2.0))),
    ("brecq", "clean inputs of the second phase", lambda one: replace(one, inputs="student")),
    ("brecq", "norm of the second phase", lambda one: replace(one, norm=2.0)),
    ("brecq", "cosine", lambda one: replace(one, without="cosine")),
    ("qdrop", "gradient scale", lambda one: replace(one, lsq_scale=False)),
    ("qdrop", "mixing", lambda one: replace(one, without="mixing")),
    ("qdrop", "order of mixing", lambda one: replace(one, without="order of mixing")),
    ("qdrop", "dropping", lambda one: replace(one, without="dropping")),
    ("qdrop", "cosine", lambda one: replace(one, without="cosine")),
    ("qdrop", "warm-up of the regulariser", lambda one: replace(one, without="warm-up")),
    ("qdrop", "activations while caching", lambda one: replace(one, without="activations while caching")),
    ("genie_m", "no gradient scale", lambda one: replace(one, lsq_scale=True)),
    ("genie_m", "step sizes of weights", lambda one: replace(one, weight_step_lr=0.0)),
    ("genie_m", "ranges set anew", lambda one: replace(one, calibrated_on=None)),
    ("genie_m", "images that set ranges", lambda one: replace(one, calibrated_on=COUNT)),
    ("genie_m", "mixing", lambda one: replace(one, without="mixing")),
    ("genie_m", "activations while caching", lambda one: replace(one, without="activations while caching")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "part", "change"), PARTS, ids=[f"{name}: {part}" for name, part, _ in PARTS])
def test_without_a_part_the_steps_are_others(name: str, part: str, change: Change) -> None:
    """The comparison above would see it: fifty times its tolerance."""
    _, traces = slow(name, result_of(name), change)
    wanted, found = numbers(traces), shown(result_of(name))
    assert deviation(found, wanted) > 0.01


@pytest.mark.parametrize("name", OWN)
def test_how_many_images_are_cached_at_a_time_does_not_matter(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The results above are of one chunk of 10 images; these of chunks of 4, 4 and 2."""
    monkeypatch.setattr(calibrate, "_MOST_AT_ONCE", 4)
    found, wanted = shown(quantize(name)), shown(result_of(name))
    assert found.keys() == wanted.keys()
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, rel=2e-4, abs=1e-7), key
