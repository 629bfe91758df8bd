"""How the error of a quantized pipeline grows over the steps of its sampler, beside the float one's."""

from __future__ import annotations

from dataclasses import dataclass

from synthquant.data.sampler_steps import SamplerSteps
from synthquant.evaluate.paired import Estimate, mean


@dataclass(frozen=True)
class StepError:
    """The distance before one step."""

    step: int
    """Counted from 0; before the first step both are the same noise."""
    timestep: float
    """As the denoiser is told it."""
    error: Estimate
    """`|x - x_float| / |x_float|`, mean over images with a 95% interval."""


def step_errors(steps: SamplerSteps | None, reference: SamplerSteps | None) -> tuple[StepError, ...]:
    """Return the distance of two samplers before each step, over images of the same seeds.

    None if a set has no steps, or they are of other seeds or other steps of the sampler.
    """
    pairs = None if steps is None or reference is None else steps.paired(reference)
    if pairs is None or steps is None:
        return ()
    found, right = (each.double().flatten(2) for each in pairs)
    errors = (found - right).norm(dim=2) / right.norm(dim=2)
    return tuple(StepError(step, float(time), mean(errors[step])) for step, time in enumerate(steps.times.tolist()))
