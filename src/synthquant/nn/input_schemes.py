"""Parts of a scheme that change what layers read before it is quantized: differences of steps, rotated channels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from synthquant.core.settings import Settings


class ModulationScheme(Settings):
    """MoDiff (arXiv:2506.22463): layers read how their input differs from the sampler's step before."""

    ranges: Literal["dynamic", "static"] = "dynamic"
    """Ranges of differences: `dynamic`, from the smallest to the largest of each sample's at run time; `static`, one
    for each layer, set from differences between the steps of a trajectory, good for a sampler with these steps only."""
    first_bits: int | None = 8
    """Bits of what layers read at the sampler's first step, if differences do not have more; null: floating point, as
    the authors' code has it."""

    def describe(self) -> str:
        """A few words for the scheme's line."""
        first = "float" if self.first_bits is None else f"{self.first_bits} bit"
        return f"differences between sampler steps, {self.ranges} ranges, first step {first}"


class RotationScheme(Settings):
    """Input channels rotated by Hadamard matrices, in blocks (ConvRot, arXiv:2512.03673)."""

    block: int = Field(default=256, ge=4)
    """Most channels that are rotated together: blocks are the largest power of 4 up to it that divides a layer's input
    channels."""

    def describe(self) -> str:
        """A few words for the scheme's line."""
        return f"rotated in blocks of up to {self.block} channels"
