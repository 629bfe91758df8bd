"""What the stages of a run measured, as `run.json` holds it: every key with its type and the range it can have.

A stage that is done has at least the keys of `required`; the others belong to some runs only. Keys that are not known
here are for other readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

Share = Annotated[float, Field(ge=0, le=1, strict=True)]
"""0..1."""
Number = Annotated[float, Field(strict=True)]
Size = Annotated[float, Field(ge=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Bits = Annotated[int, Field(ge=1, le=64, strict=True)]


class Row(BaseModel):
    """A row of a table; keys that are not known are for other readers."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class AccuracyRow(Row):
    """One network on the evaluation images."""

    name: StrictStr
    count: Count | None = None
    top1: Share | None = None
    top5: Share | None = None
    interval: tuple[Share, Share] | None = None
    agreement: Share | None = None
    kl: Size | None = None
    sqnr: Number | None = None
    recovery: Size | None = None
    size_bytes: Size | None = None
    bit_operations: Size | None = None
    seconds: Size | None = None
    metrics: dict[StrictStr, Number | None] = {}


class UnitRow(Row):
    """One reconstruction unit with its sampled loss curve."""

    name: StrictStr
    loss_start: Number | None = None
    loss_end: Number | None = None
    undecided: Share | None = None
    diverged: StrictBool = False
    seconds: Size | None = None
    steps: tuple[Count, ...] = ()
    losses: tuple[Number | None, ...] = ()


class SqnrRow(Row):
    """Signal-to-quantization-noise ratios of one layer [dB]."""

    name: StrictStr
    weights: Number | None = None
    activations: Number | None = None
    alone: Number | None = None
    cumulative: Number | None = None


class OutputSqnrRow(Row):
    """Those of the outputs of a network that is no classifier [dB], together, one by one and by channels; agreement."""

    total: Number | None = None
    outputs: dict[str, Number | None]
    channels: dict[str, tuple[Number | None, ...]] = {}
    agreement: dict[str, dict[str, Number]] = {}


class CoverageRow(Row):
    """What became of one layer, or of a weight, a matrix product or another operation outside of layers."""

    name: StrictStr
    kind: StrictStr = ""
    weight_bits: Bits | None = None
    input_bits: Bits | None = None
    parameters: Count | None = None
    macs: Count | None = None
    reason: StrictStr | None = None
    input_kind: StrictStr | None = None
    output_bits: Bits | None = None


class CoverageTotals(Row):
    """The coverage in numbers."""

    layers: Count
    quantized_layers: Count
    weights: Share
    multiply_adds: Share
    floating: dict[str, Share]


class FineTunePoint(Row):
    """What was measured of a network while it was trained.

    Attributes:
        step: steps that were made; 0 is the network that training started from.
        loss: mean of the steps since the point before, on images varied at random; none at the start.
        held_out: agreement with the float network on images held out of training.
        training: the same on as many of the images that are trained on, as they are: higher where those were learned
            by heart.
        kl: mean divergence from the float network on images held out [nats].
    """

    step: Count
    loss: Number | None = None
    held_out: Share
    training: Share
    kl: Size


class SetAside(Row):
    """An image that was not used."""

    name: StrictStr
    reason: StrictStr


class FilterRow(Row):
    """What one filter of images did."""

    method: StrictStr
    entered: Count
    kept: Count


class DiversityRow(Row):
    """How diverse the images are."""

    of: StrictStr
    count: Count
    distance: Size | None = None
    effective_rank: Size | None = None


class Metrics(BaseModel):
    """What one stage measured."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    required: ClassVar[tuple[str, ...]] = ()
    """Keys that every stage that is done has."""


class ReadMetrics(Metrics):
    """What happened to the images that a stage read."""

    set_aside_count: Count | None = None
    set_aside: tuple[SetAside, ...] = ()
    changed: dict[str, Count] | None = None


class ModelMetrics(Metrics):
    """The network that a run is about."""

    required = ("name", "fingerprint")

    name: StrictStr | None = None
    fingerprint: StrictStr | None = None
    num_classes: Count | None = None
    class_names: tuple[StrictStr, ...] | None = None
    parameters: Count | None = None
    preprocess: dict[str, Any] | None = None


class ImagesMetrics(Metrics):
    """The images that were made, or given."""

    required = ("method", "count")

    method: StrictStr | None = None
    count: Count | None = None
    source: StrictStr | None = None
    suspicious: dict[str, Count] | None = None
    fingerprint: StrictStr | None = None
    diversity: DiversityRow | None = None


class SelectMetrics(Metrics):
    """The choice among them."""

    required = ("pool", "count", "fingerprint")

    pool: Count | None = None
    count: Count | None = None
    rejected: Count | None = None
    fingerprint: StrictStr | None = None
    filters: tuple[FilterRow, ...] = ()
    bn_distance: dict[str, Size] | None = None


class QuantizeMetrics(ReadMetrics):
    """The quantized network, layer by layer."""

    required = ("method", "scheme")

    method: StrictStr | None = None
    scheme: StrictStr | None = None
    units: tuple[UnitRow, ...] = ()
    coverage: tuple[CoverageRow, ...] = ()
    coverage_summary: CoverageTotals | None = None


class FineTuneMetrics(Metrics):
    """What training made of it: the network of `best_step`, which agrees best with the float one on images held out."""

    required = ("method", "steps", "best_step", "points")

    method: StrictStr | None = None
    steps: Count | None = None
    best_step: Count | None = None
    held_out_count: Count | None = None
    diverged: StrictBool = False
    points: tuple[FineTunePoint, ...] | None = None


class CheckpointMetrics(Metrics):
    """The files of the quantized network."""

    weights_sha256: StrictStr | None = None


class EvaluateMetrics(ReadMetrics):
    """Float beside quantized."""

    required = ("accuracy", "count")

    data: StrictStr | None = None
    count: Count | None = None
    accuracy: Annotated[tuple[AccuracyRow, ...], Field(min_length=2, max_length=2)] | None = None
    sqnr: tuple[SqnrRow, ...] = ()
    output_sqnr: OutputSqnrRow | None = None


class HeldOutMetrics(Metrics):
    """Single images' outputs [dB] and agreement, of images that it was quantized with and of others like them."""

    required = ("count", "sqnr", "held_out_count", "held_out_sqnr", "error")

    count: Count | None = None
    sqnr: Number | None = None
    agreement: Share | None = None
    held_out_count: Count | None = None
    held_out_sqnr: Number | None = None
    held_out_agreement: Share | None = None
    error: Size | None = None


class ExportMetrics(Metrics):
    """The file or folder for a runtime."""

    required = ("file", "bytes")

    file: StrictStr | None = None
    bytes: Count | None = None
    sha256: StrictStr | None = None


class BenchmarkMetrics(Metrics):
    """Its speed beside that of the float network."""

    required = ("speedup", "batch", "threads")

    speedup: Size | None = None
    batch: Count | None = None
    threads: Count | None = None


class ReportMetrics(Metrics):
    """The page."""

    sha256: StrictStr | None = None


METRICS: Mapping[str, type[Metrics]] = {
    "model": ModelMetrics,
    "images": ImagesMetrics,
    "select": SelectMetrics,
    "quantize": QuantizeMetrics,
    "finetune": FineTuneMetrics,
    "checkpoint": CheckpointMetrics,
    "evaluate": EvaluateMetrics,
    "held_out": HeldOutMetrics,
    "export": ExportMetrics,
    "benchmark": BenchmarkMetrics,
    "report": ReportMetrics,
}
"""Stages in the order in which a run does them."""
