"""One run of a sampler: which calls of a denoiser are its steps, and whether a call can be the next one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.models.signature import Inputs

_TIMESTEP = ("timestep", "timesteps", "t")
"""What denoisers call the argument that says how noisy their input is."""
_SHOWN = 4
# Timesteps of one scheduler may be computed in float32.
_SAME = 1e-4


class SamplerRun:
    """Whether a sampler runs, and what its steps are.

    Attributes:
        network: name of the denoiser, for messages.
        active: a sampler runs.
        timesteps: float64 `[S]`, the steps that static ranges are of; empty if ranges are measured at run time.
        steps: how many steps the run has made.
    """

    def __init__(self, network: str, forward: Callable[..., Any]) -> None:
        """A run of a network with that (bound) forward, not begun yet.

        Raises:
            UnsupportedModelError: no argument of it is a timestep.
        """
        self.network = network
        self._names = list(inspect.signature(forward).parameters)
        self._timestep = next((name for name in _TIMESTEP if name in self._names), "")
        if not self._timestep:
            raise UnsupportedModelError(
                f"{network}: modulation works between the steps of a sampler, and this network takes no timestep (an"
                f" argument {', '.join(_TIMESTEP)}); leave scheme.modulation out"
            )
        self.timesteps = torch.zeros(0, dtype=torch.float64)
        self.active = False
        self._reset()

    def _reset(self) -> None:
        self.steps = 0
        self._shape: torch.Size | None = None
        self._last: Tensor | None = None
        self._direction = 0

    def begin(self) -> None:
        """Begin a run; raises `InputError` if one is under way."""
        if self.active:
            raise InputError(
                f"{self.network}: another sampler runs already, and a modulated network keeps one trajectory; finish"
                " it first"
            )
        self._reset()
        self.active = True

    def end(self) -> None:
        """End the run."""
        self._reset()
        self.active = False

    def step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take a call of the network as the next step.

        Raises:
            InputError: it cannot be: its batch has another size, or its timestep is not the next one.
        """
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        first = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim)
        self._check_shape(first.shape)
        if self._timestep in given:
            self._check_timestep(torch.as_tensor(given[self._timestep]).detach().to("cpu", torch.float64).reshape(-1))
        self.steps += 1

    def _check_shape(self, shape: torch.Size) -> None:
        if self._shape is not None and shape != self._shape:
            raise InputError(
                f"{self.network}: step {self.steps + 1} of the sampler has a batch {list(shape)} and the one before"
                f" {list(self._shape)}; a modulated network keeps the same images from the first step to the last"
            )
        self._shape = shape

    def _check_timestep(self, time: Tensor) -> None:
        if len(self.timesteps):
            self._check_calibrated(time)
        if self._last is not None and (len(self._last) == len(time) or 1 in (len(self._last), len(time))):
            moved = {int(sign) for sign in (time - self._last).sign().tolist() if sign}
            if len(moved | {self._direction} - {0}) > 1:
                raise InputError(
                    f"{self.network}: the timestep went from {_text(self._last)} back to {_text(time)}: a new"
                    " trajectory, or two that are interleaved; begin each one anew (QuantModel.sampling)"
                )
            self._direction = next(iter(moved), self._direction)
        self._last = time

    def _check_calibrated(self, time: Tensor) -> None:
        known = self.steps < len(self.timesteps)
        if known and torch.allclose(time, self.timesteps[self.steps].expand_as(time), rtol=_SAME, atol=_SAME):
            return
        listed = ", ".join(f"{value:g}" for value in self.timesteps[:_SHOWN].tolist())
        raise InputError(
            f"{self.network}: static ranges of differences are of a sampler with {len(self.timesteps)} steps ({listed},"
            f" ...), and step {self.steps + 1} of this one is at {_text(time)}; sample with those steps, or quantize"
            " with scheme.modulation.ranges=dynamic"
        )

    def timestep_of(self, inputs: Inputs) -> float:
        """The timestep of a batch of which every sample is at the same step; not a number if they are not."""
        named = {**dict(zip(self._names, inputs.args, strict=False)), **inputs.kwargs}
        time = torch.as_tensor(named[self._timestep]).reshape(-1)
        return float(time[0]) if bool((time == time[0]).all()) else float("nan")


def _text(time: Tensor) -> str:
    return f"{time[0]:g}" if len(time) == 1 or bool((time == time[0]).all()) else f"{time.min():g} to {time.max():g}"
