"""Errors of a unit that look at the network's answer: settings of the methods that offer them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from synthquant.core.settings import is_unset
from synthquant.quantize.fima import fima
from synthquant.quantize.global_local import global_local
from synthquant.quantize.learn import Phase
from synthquant.quantize.rounding import LearnedRounding
from synthquant.quantize.unit_fit import UNIT_ERRORS

_PUBLISHED_RANK = 5
_WEIGHT_LR = 1e-4


class NetworkErrors(LearnedRounding):
    """Settings of a method that learns roundings and step sizes together, from inputs of both networks."""

    error: Literal["fima", "global_local"] | None = Field(default=None, exclude_if=is_unset)
    """What a unit minimises: `fima`, its squared error as a low-rank and diagonal Fisher matrix weighs it (FIMA-Q);
    `global_local`, the error of what enters the last layer and twice that of the unit, with weights that are learned
    straight through their rounding (after GLF-Q); none: the plain squared error of its output."""
    fisher_rank: int | None = Field(default=None, ge=1, exclude_if=is_unset)
    """Gradients that the Fisher matrix of `fima` is made of, measured at as many steps; none: 5, as published."""
    weight_lr: float | None = Field(default=None, gt=0, exclude_if=is_unset)
    """Adam learning rate of weights with `global_local`, as a share of their grid's range, cosine to 0; none: 1e-4."""

    @model_validator(mode="after")
    def _check_error(self) -> NetworkErrors:
        for name, error in (("fisher_rank", "fima"), ("weight_lr", "global_local")):
            if getattr(self, name) is not None and self.error != error:
                raise ValueError(f"{name} is a setting of error={error}; give that too, or leave {name} out")
        return self

    def with_error(self, phase: Phase) -> Phase:
        """Return the phase with the error that the settings name.

        With `global_local`, steps of weights are learned at the method's own rate, or at that of activations.
        """
        if self.error == "fima":
            return replace(phase, error=UNIT_ERRORS.name_of(fima), fisher_rank=self.fisher_rank or _PUBLISHED_RANK)
        if self.error == "global_local":
            return replace(
                phase,
                error=UNIT_ERRORS.name_of(global_local),
                rounding_lr=0.0,
                rounding_weight=0.0,
                weight_lr=self.weight_lr or _WEIGHT_LR,
                weight_scale_lr=phase.weight_scale_lr or phase.activation_scale_lr,
            )
        return phase
