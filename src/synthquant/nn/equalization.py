"""Equalisation: another float network that computes the same and is easier to quantize.

`Equalization` says what is done to each layer, `apply` does it. How the factors are found stands in
`synthquant.quantize.equalize` and, behind layer norms, `synthquant.quantize.reparameterize`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from synthquant.core.errors import ModelError
from synthquant.core.modules import get_module, replace_module

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ENDINGS = {
    "rows": "equalize_rows",
    "columns": "equalize_columns",
    "shifts": "equalize_shift",
    "bounds": "equalize_bounds",
    "bound_shifts": "equalize_bound_shift",
    "norms": "equalize_norm",
    "norm_shifts": "equalize_norm_shift",
}
"""Endings of the names that the tensors have in a checkpoint."""


@dataclass(frozen=True)
class Equalization:
    """Factors and shifts on the CPU, by the name of the layer, clip or parameter; what is not there stays as it is."""

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    """`[C_out]`: what the weights and the bias of an output channel are multiplied by."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """`[C_in]`: what the weights of an input channel are multiplied by."""
    shifts: Mapping[str, Tensor] = field(default_factory=dict)
    """`[C_out]`: what is added to the bias then."""
    bounds: Mapping[str, Tensor] = field(default_factory=dict)
    """`[C]`: what the bounds of a clip are multiplied by."""
    bound_shifts: Mapping[str, Tensor] = field(default_factory=dict)
    """`[C]`: what is added to the upper bound then; the lower one, if it is 0, stays."""
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    """`[C]`: what a parameter of a layer norm is multiplied by."""
    norm_shifts: Mapping[str, Tensor] = field(default_factory=dict)
    """`[C]`: what is added to that parameter then."""

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as names and tensors of a file, none of which share memory."""
        return {
            f"{name}.{ending}": value.clone()
            for key, ending in ENDINGS.items()
            for name, value in sorted(getattr(self, key).items())
        }

    @classmethod
    def split(cls, tensors: Mapping[str, Tensor]) -> tuple[Equalization | None, dict[str, Tensor]]:
        """Divide the tensors of a file into what `tensors` gave (none if there is nothing of it), and the others."""
        found: dict[str, dict[str, Tensor]] = {key: {} for key in ENDINGS}
        others = {}
        keys = {ending: key for key, ending in ENDINGS.items()}
        for name, value in tensors.items():
            layer, _, ending = name.rpartition(".")
            if ending in keys:
                found[keys[ending]][layer] = value
            else:
                others[name] = value
        return (cls(**found) if any(found.values()) else None), others

    @property
    def fingerprint(self) -> str:
        """Hash that changes when a number changes."""
        digest = hashlib.sha256()
        for name, value in self.tensors().items():
            digest.update(name.encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    def then(self, other: Equalization) -> Equalization:
        """Both, one after the other, as one."""
        both: dict[str, dict[str, Tensor]] = {}
        for factors, shifts in (("rows", "shifts"), ("bounds", "bound_shifts"), ("norms", "norm_shifts")):
            first, later = getattr(self, shifts), getattr(other, factors)
            moved = {name: shift * later.get(name, 1) for name, shift in first.items()}
            both[factors] = _combined(torch.mul, getattr(self, factors), later)
            both[shifts] = _combined(torch.add, moved, getattr(other, shifts))
        return Equalization(columns=_combined(torch.mul, self.columns, other.columns), **both)

    @torch.no_grad()
    def apply(self, module: nn.Module) -> None:
        """Change a network whose batch norms are folded, in place; what has no bias and is shifted gets one.

        Raises:
            ModelError: it has no such layer or parameter, or one of another shape.
        """
        for name in {**self.rows, **self.columns, **self.shifts}:
            layer = get_module(module, name)
            weight = layer._parameters.get("weight")
            rows, columns, shift = self.rows.get(name), self.columns.get(name), self.shifts.get(name)
            try:
                if weight is None:
                    raise ValueError("no weight of its own")
                _scale(layer, rows, columns)
                if layer._parameters.get("bias") is not None or shift is not None:
                    _change(layer, "bias", rows, shift)
            except (ValueError, RuntimeError) as error:
                raise ModelError(f"equalisation does not fit layer {name} of this network: {error}") from error
        for name in {**self.norms, **self.norm_shifts}:
            owner, _, parameter = name.rpartition(".")
            try:
                _change(get_module(module, owner), parameter, self.norms.get(name), self.norm_shifts.get(name))
            except (ValueError, RuntimeError) as error:
                raise ModelError(f"equalisation does not fit parameter {name} of this network: {error}") from error
        for name in {**self.bounds, **self.bound_shifts}:
            clip = get_module(module, name)
            if not isinstance(clip, nn.Hardtanh):
                raise ModelError(f"equalisation does not fit this network: {name} is no ReLU6 or Hardtanh")
            bounded = ChannelClip.of(clip, self.bounds.get(name), self.bound_shifts.get(name))
            replace_module(module, name, bounded.to(next(module.parameters())))


class ChannelClip(nn.Module):
    """A ReLU6 or Hardtanh with bounds of its own for each channel (dimension 1).

    Attributes:
        low: `[C]`, lower bounds.
        high: `[C]`, upper bounds.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor, *, inplace: bool = False) -> None:
        """Take the bounds, and whether to overwrite what is clipped."""
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.inplace = inplace

    @classmethod
    def of(cls, clip: nn.Hardtanh, factor: Tensor | None, shift: Tensor | None) -> ChannelClip:
        """The clip that takes the place of `clip` where channels are scaled and shifted."""
        given = factor if factor is not None else shift
        assert given is not None
        factor = torch.ones_like(given) if factor is None else factor
        shift = torch.zeros_like(given) if shift is None else shift
        return cls(factor * clip.min_val, factor * clip.max_val + shift, inplace=clip.inplace)

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[B, C, ...]`, clipped."""
        shape = (-1, *[1] * (x.ndim - 2))
        low, high = self.low.view(shape), self.high.view(shape)
        return x.clamp_(low, high) if self.inplace else x.clamp(low, high)


def weight_by_group(layer: nn.Module) -> Tensor:
    """A view `[G, C_out / G, C_in / G, ...]` of the float weight of a convolution or linear layer with `G` groups."""
    weight = cast(Tensor, layer._parameters["weight"])
    groups: int = getattr(layer, "groups", 1)
    grouped = weight.view(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2) if isinstance(layer, _TRANSPOSED) else grouped


def _combined(
    join: Callable[[Tensor, Tensor], Tensor], first: Mapping[str, Tensor], later: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The values of both, joined where a name is in both."""
    return {**first, **later, **{name: join(first[name], later[name]) for name in first.keys() & later.keys()}}


def _change(part: nn.Module, name: str, factor: Tensor | None, shift: Tensor | None) -> None:
    """Multiply a parameter and add to it, in place; one that may be there and is not counts as zeros."""
    own = part._parameters
    if name not in own:
        raise ValueError("no such parameter")
    if own[name] is None and shift is not None:
        like = next(value for value in own.values() if value is not None)
        zeros = torch.zeros(shift.shape, dtype=like.dtype, device=like.device)
        own[name] = nn.Parameter(zeros, requires_grad=like.requires_grad)
    parameter = own[name]
    if parameter is not None and factor is not None:
        parameter.mul_(factor.to(parameter))
    if parameter is not None and shift is not None:
        parameter.add_(shift.to(parameter))


def _scale(layer: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Multiply output and input channels of the weight by factors, in place."""
    weight = weight_by_group(layer)
    groups, outputs, inputs, *kernel = weight.shape
    if rows is not None:
        weight.mul_(rows.to(weight).view(groups, outputs, 1, *[1] * len(kernel)))
    if columns is not None:
        weight.mul_(columns.to(weight).view(groups, 1, inputs, *[1] * len(kernel)))
