"""What a comparison of image sets found, as `quality.json` in a run's folder holds it for reports and model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, StrictBool, StrictStr, ValidationError

from synthquant.core.errors import InputError
from synthquant.core.files import read_sealed_json, write_sealed_json
from synthquant.core.run_metrics import Count, Number, Row, Size

QUALITY_NAME = "quality.json"
_VERSION = 1


class EstimateRow(Row):
    """A value with its 95% interval."""

    value: Number
    low: Number
    high: Number


class KernelRow(Row):
    """The kernel distance over subsets."""

    value: Number
    std: Size
    subsets: Count
    subset_size: Count


class AgreementRow(Row):
    """Shares of images in the class that they were drawn for."""

    images: EstimateRow | None = None
    reference: EstimateRow | None = None
    difference: EstimateRow | None = None


class SameSeedRow(Row):
    """Pairs of images of the same seed."""

    pairs: Count
    identical: Count
    psnr: EstimateRow | None = None
    ssim: EstimateRow | None = None
    feature_distance: EstimateRow
    same_class: EstimateRow | None = None


class RelativeRow(Row):
    """The distance beside that of the float pipeline's images."""

    baseline: EstimateRow
    ratio: EstimateRow
    paired: StrictBool


class StepErrorRow(Row):
    """How far two pipelines are apart before one step of the sampler."""

    step: Count
    timestep: Number
    error: EstimateRow


class Quality(Row):
    """All of it; `evaluate.image_quality.ImageQuality` says what the numbers are."""

    images: StrictStr
    reference: StrictStr
    baseline: StrictStr | None = None
    features: StrictStr
    count: Count
    reference_count: Count
    frechet: EstimateRow
    kernel: KernelRow
    precision: EstimateRow
    recall: EstimateRow
    class_agreement: AgreementRow | None = None
    same_seed: SameSeedRow | None = None
    relative: RelativeRow | None = None
    step_errors: tuple[StepErrorRow, ...] = ()
    seed: Count = 0
    settings: dict[str, Any] = Field(default_factory=dict)

    @property
    def beside(self) -> str:
        """The set that images of the same seed are compared with."""
        return self.reference if self.baseline is None else self.baseline


def write_quality(folder: Path, found: dict[str, Any]) -> Path:
    """Write what a comparison found into a run's folder; returns the file. Raises `OutputError`."""
    write_sealed_json(folder / QUALITY_NAME, {"version": _VERSION, **found})
    return folder / QUALITY_NAME


def read_quality(folder: Path) -> Quality | None:
    """Return what a comparison left in a run's folder; none if there was none.

    Raises `InputError` if the file is not as it was written, or of another version.
    """
    path = folder / QUALITY_NAME
    if not path.is_file():
        return None
    content = read_sealed_json(path)
    if content.get("version") != _VERSION:
        raise InputError(f"{path} has format version {content.get('version')!r}, this release reads {_VERSION}")
    return as_quality(content, str(path))


def as_quality(found: dict[str, Any], where: str) -> Quality:
    """Return the result of a comparison with its types; raises `InputError` for what is none."""
    try:
        return Quality.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where} is not what a comparison found: {place}: {first['msg']}") from error
