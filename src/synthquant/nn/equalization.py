"""Cross-layer equalisation: another float network that computes the same and is easier to quantize.

`Equalization` says what is done to each layer, `apply` does it. How the factors are found stands in
`synthquant.quantize.equalize`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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
}
"""Endings of the names that the tensors have in a checkpoint."""


@dataclass(frozen=True)
class Equalization:
    """Factors and shifts, float32 on the CPU, by the name of the layer or clip; what is not there stays as it is."""

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

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as names and tensors of a file."""
        return {
            f"{name}.{ending}": value
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

    @torch.no_grad()
    def apply(self, module: nn.Module) -> None:
        """Change a network whose batch norms are folded, in place.

        Raises:
            ModelError: it has no such layer, or one of another shape or without a bias that a shift is for.
        """
        for name in {**self.rows, **self.columns, **self.shifts}:
            layer = get_module(module, name)
            weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
            rows, columns, shift = self.rows.get(name), self.columns.get(name), self.shifts.get(name)
            try:
                if weight is None or (shift is not None and bias is None):
                    raise ValueError("no weight or bias of its own")
                _scale(layer, rows, columns)
                if rows is not None and bias is not None:
                    bias.mul_(rows.to(bias))
                if shift is not None and bias is not None:
                    bias.add_(shift.to(bias))
            except (ValueError, RuntimeError) as error:
                raise ModelError(f"equalisation does not fit layer {name} of this network: {error}") from error
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


def _scale(layer: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Multiply output and input channels of the weight by factors, in place."""
    weight = weight_by_group(layer)
    groups, outputs, inputs, *kernel = weight.shape
    if rows is not None:
        weight.mul_(rows.to(weight).view(groups, outputs, 1, *[1] * len(kernel)))
    if columns is not None:
        weight.mul_(columns.to(weight).view(groups, 1, inputs, *[1] * len(kernel)))
