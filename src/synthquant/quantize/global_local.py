"""A unit's error seen from behind the network and from behind the unit itself, after GLF-Q."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from synthquant.core.modules import get_module, hooked
from synthquant.core.rng import Rng
from synthquant.models.signature import Leaves, named_outputs
from synthquant.quantize.unit_fit import UNIT_ERRORS, ErrorOf, UnitFit

_LOCAL = 2.0


@UNIT_ERRORS.register("global_local")
def global_local(unit: UnitFit, rng: Rng) -> ErrorOf:
    """The error seen from behind the network, and twice that from behind the unit."""
    return GlobalLocalError(unit, rng)


class GlobalLocalError:
    """`global / global_0 + 2 local / local_0`, each divided by its value in the first batch.

    `local` is the mean squared error of what the unit puts out; `global` that of what enters the last layer of a
    classifier when the unit's output goes through the float rest of the network, or of what the network gives if it is
    no classifier or its last layer is in the unit. After GLF-Q (2026), of which no public text was found: this is the
    specification, and no reproduction is claimed.
    """

    def __init__(self, unit: UnitFit, rng: Rng) -> None:
        self._unit, self._mixing = unit, rng.generator("mix", unit.device)
        model = unit.model
        self._at_last_layer = model.float_model.task == "classify" and model.last_layer not in unit.unit.layers
        answers = [self._far(partial(unit.float_answer, batch)) for batch in unit.samples()]
        self._wanted = torch.cat(answers)
        self._sizes: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """The error for samples of these indices, `[B]`."""
        return self.judge(batch, self._unit.output(batch, self._mixing))

    def judge(self, batch: torch.Tensor, output: Leaves) -> torch.Tensor:
        """The error of what the unit puts out for these samples."""
        far = F.mse_loss(self._far(partial(self._unit.rest, batch, output)), self._wanted[batch])
        near = _near(output, self._unit.targets.gather(batch))
        if self._sizes is None:
            smallest = torch.finfo(far.dtype).tiny
            self._sizes = (far.detach().clamp_min(smallest), near.detach().clamp_min(smallest))
        return far / self._sizes[0] + _LOCAL * near / self._sizes[1]

    def _far(self, run: Callable[[], Any]) -> torch.Tensor:
        """What `run()`, a pass of the network, shows at its end, `[B, F]`."""
        caught: list[torch.Tensor] = []

        def catch(_: nn.Module, args: Any) -> None:
            caught.append(args[0])

        model = self._unit.model
        last = get_module(model.module, model.last_layer)
        with hooked(pre=[(last, catch)] if self._at_last_layer else []):
            answer = run()
        tensors = caught[-1:] if self._at_last_layer else list(named_outputs(answer).values())
        return torch.cat([tensor.flatten(1) for tensor in tensors], 1).float()


def _near(output: Leaves, wanted: Leaves) -> torch.Tensor:
    """Mean squared error of all floating-point numbers that a unit puts out."""
    pairs = [(one, other) for one, other in zip(output, wanted, strict=True) if other.is_floating_point()]
    return torch.cat([(one - other).flatten() for one, other in pairs]).square().mean()
