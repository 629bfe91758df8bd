"""What a quantization step did, as it is kept with a run."""

from __future__ import annotations

from pydantic import Field

from synthquant.core.settings import Settings, is_unset


class UnitReport(Settings):
    """What became of one reconstruction unit."""

    name: str
    """Module name of the unit; empty for the whole network."""

    layers: tuple[str, ...] = ()
    """Names of the quantized layers in the unit."""

    loss_start: float | None = None
    """Reconstruction error before the first step: squared difference per sample, summed over channels."""

    loss_end: float | None = None
    """Reconstruction error after the last step, with hard rounding."""

    undecided: float | None = None
    """Share (0..1) of soft roundings that were neither 0 nor 1 when annealing ended; none for methods without them."""

    diverged: bool = False
    """Whether the unit ended worse than it started and was therefore put back to its start."""

    seconds: float = 0.0
    """Wall-clock time of the unit."""

    steps: tuple[int, ...] = ()
    """Iterations at which `losses` was sampled, at most about 200."""

    losses: tuple[float, ...] = ()
    """The loss at these iterations, for the report's curves."""


class BiasCorrectionReport(Settings):
    """What bias correction did."""

    images: int
    """Images over which outputs were averaged."""

    layers: int
    """Layers whose bias was corrected."""

    left_out: tuple[str, ...] = ()
    """Layers with quantized weights that were left as they are: the network runs them not exactly once for each image,
    or their bias is no parameter of their own."""


class OutputCorrectionReport(Settings):
    """What output correction did."""

    layer: str
    """The layer that makes the output."""

    samples: int
    """Samples over which its outputs were regressed on the float network's."""

    shift: float
    """What was taken out of its bias, in the unit of the output: quadratic mean over channels."""

    gain_low: float
    """Smallest factor that was taken out of a channel's weights."""

    gain_high: float
    """Largest one."""


class ReparameterizationReport(Settings):
    """What reparameterisation did to layer norms."""

    norms: tuple[str, ...]
    """Layer norms that were changed together with the layers that read them."""

    left_out: dict[str, str] = Field(default_factory=dict)
    """The others, whose outputs have one grid as they are, and why."""

    def __str__(self) -> str:
        """One line."""
        left = "; ".join(f"{norm} ({reason})" for norm, reason in self.left_out.items())
        return f"reparameterised {len(self.norms)} layer norms" + (f", left out: {left}" if left else "")


class ModulationReport(Settings):
    """What a modulated network reads and keeps."""

    layers: int
    """Layers that read differences between the steps of a sampler."""

    bytes_per_row: int
    """Bytes kept between steps for each row of a batch of the example's size: an image, or with classifier-free
    guidance half of one."""

    images: int | None = None
    """Trajectories that static ranges were set from; none: ranges are measured at run time."""


class QuantReport(Settings):
    """What a quantization step did, unit by unit."""

    method: str
    """Registered name of the method."""

    units: tuple[UnitReport, ...] = ()
    """The units in execution order; empty for methods that do not reconstruct."""

    bias_correction: BiasCorrectionReport | None = None
    """What became of the biases after the method; none: they were not corrected."""

    output_correction: OutputCorrectionReport | None = Field(default=None, exclude_if=is_unset)
    """What became of the last layer after that; none: it was not corrected."""

    reparameterization: ReparameterizationReport | None = Field(default=None, exclude_if=is_unset)
    """What became of layer norms before it; none: they were left as they are."""

    modulation: ModulationReport | None = Field(default=None, exclude_if=is_unset)
    """What layers read between the steps of a sampler; none: the network is not modulated."""

    @property
    def diverged(self) -> tuple[str, ...]:
        """Names of the units that were put back to their start."""
        return tuple(unit.name for unit in self.units if unit.diverged)
