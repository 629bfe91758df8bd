"""Outputs whose channels differ in scale stay in floating point: one grid for all would take the small ones away.

Of boxes of 0..640 beside scores of 0..1 in one tensor every score becomes 0 at 8 bits. With `deploy: full` the outputs
have grids; those of such tensors are left out, in the scheme, so that checkpoint and exported file are one network.
Tensors that are joined there keep their own grids.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from synthquant.core.modules import eval_mode, hooked
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.models.samples import Samples
from synthquant.models.signature import output_channels
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import matches
from synthquant.quantize.calibrate import CalibrationSet

LARGEST_RATIO = 16.0
"""Between the largest magnitudes of two channels of an output that share a grid: at 8 bits the smaller then has 4."""

_SAMPLES = 64


def spare_outputs(model: QuantModel, source: ImageSet | Samples | None, progress: Progress = QUIET) -> dict[str, float]:
    """Take the grid from every output whose channels differ in magnitude by more than `LARGEST_RATIO`.

    Logits share a grid, whatever their scale: only their order counts. What the scheme's `overrides` say of an output
    stays.

    Args:
        model: not calibrated yet; it becomes, in place, that of the scheme with these outputs in floating point.
        source: what it is calibrated with; none: noise, as there is nothing else yet.
        progress: is told which outputs they are.

    Returns:
        The ratio of largest magnitudes of each output that lost its grid, by the name of its quantizer.
    """
    asked = [pattern for pattern, change in model.scheme.overrides.items() if "input_activations" in change]
    names = [name for name in model.output_quantizers if not any(matches(pattern, name) for pattern in asked)]
    if model.float_model.task == "classify" or not names:
        return {}
    found = {name: ratio for name, ratio in _ratios(model, names, source).items() if ratio > LARGEST_RATIO}
    if found:
        changes = {name: {"input_activations": None} for name in found}
        model.rebuild(model.scheme.model_copy(update={"overrides": model.scheme.overrides | changes}))
        listed = ", ".join(f"{name} ({ratio:.0f} times)" for name, ratio in found.items())
        progress.say(
            f"outputs in float, for their channels differ in scale more than {LARGEST_RATIO:.0f} times: {listed}"
        )
    return found


@torch.no_grad()
def _ratios(model: QuantModel, names: list[str], source: ImageSet | Samples | None) -> dict[str, float]:
    """Largest over smallest of the largest magnitudes of channels; channels that are 0 throughout are left out."""
    largest: dict[tuple[str, int], Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
            for dim in output_channels(args[0]):
                values = args[0].abs().transpose(0, dim).flatten(1).amax(1)
                before = largest.get((name, dim), values)
                largest[name, dim] = torch.maximum(before, values) if before.shape == values.shape else values

        return look

    hooks = [(model.quantizers[name], watch(name)) for name in names]
    with eval_mode(model), model.mode(weights=False, activations=False), hooked(pre=hooks):
        if source is None:
            model.float_model.example(_SAMPLES).to(model.device).call(model)
        else:
            CalibrationSet(model, source).run(model, _SAMPLES)
    ratios: dict[str, float] = {}
    for (name, _), values in largest.items():
        known = values[values > 0].double()
        if known.numel() > 1 and math.isfinite(ratio := float(known.max() / known.min())):
            ratios[name] = max(ratio, ratios.get(name, 0.0))
    return ratios
