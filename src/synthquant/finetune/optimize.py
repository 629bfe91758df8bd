"""Optimisers of fine-tuning, and how their rates rise and fall."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synthquant.core.errors import UnsupportedModelError

Optimizer = Literal["adamw", "sgd"]


class Trainer:
    """An optimiser over named parameters, each with a rate of its own.

    Attributes:
        learned: those that it moves.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rates: Mapping[str, float],
        decays: Mapping[str, float],
        *,
        optimizer: Optimizer,
        momentum: float,
        clip: float,
    ) -> None:
        """Learn `parameters` at `rates`, pulled to zero by `decays`; those at a rate of 0 stay as they are.

        Raises `UnsupportedModelError` if that is all of them.
        """
        self._names = [name for name in parameters if rates[name] > 0]
        if not self._names:
            raise UnsupportedModelError(
                "the network has nothing of what is to be learned, so training would change nothing; give another"
                " learning rate than those that are above 0"
            )
        self.set_rates(rates)
        self.learned = [parameters[name] for name in self._names]
        self._clip = clip
        groups = [
            {"params": [parameters[name]], "lr": rates[name], "weight_decay": decays[name]} for name in self._names
        ]
        self.optimizer: torch.optim.Optimizer
        if optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups, betas=(momentum, 0.999), fused=True)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=momentum > 0, fused=True)

    def set_rates(self, rates: Mapping[str, float]) -> None:
        """Learn at other rates from now on, those parameters that are learned."""
        self._rates = [rates[name] for name in self._names]

    def step(self, share: float) -> None:
        """Make a step along the gradients that there are, at a share of the rates, and drop these."""
        if self._clip > 0:
            nn.utils.clip_grad_norm_(self.learned, self._clip, foreach=True)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """What the optimiser remembers, by name."""
        state: dict[str, Any] = self.optimizer.state_dict()["state"]
        return {
            f"{self._names[int(index)]}.{key}": torch.as_tensor(value)
            for index, entries in state.items()
            for key, value in entries.items()
            if value is not None
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""
        entries: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self._names):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer") if f"{name}.{key}" in state]
            if keys:
                entries[index] = {key: state[f"{name}.{key}"] for key in keys}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})


def rate_at(step: int, iterations: int, warm_up: float) -> float:
    """Share of the learning rate at a step (1 .. iterations): linear over `warm_up` of them, then a cosine to 0."""
    rising = round(warm_up * iterations)
    if step <= rising:
        return step / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising - 1) / max(iterations - rising, 1)))
