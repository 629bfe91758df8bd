"""What a comparison of image sets found, as `quality.json` in a run's folder holds it for reports and model cards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, StrictBool, StrictStr, ValidationError

from synthquant.core.errors import InputError
from synthquant.core.files import read_sealed_json, write_sealed_json
from synthquant.core.formatting import count, interval, number, percent, signed_percent, significant
from synthquant.core.run_metrics import Count, Number, Row, Size

QUALITY_NAME = "quality.json"
_VERSION = 1


@dataclass(frozen=True)
class Measure:
    """One of the numbers, as it is printed."""

    name: str
    """What it is, with its unit."""
    value: str
    interval: str
    """Of 95%; empty: none was measured."""
    remark: str = ""


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

    def measures(self) -> list[Measure]:
        """Return all that was measured, as terminal, report and model card print it."""
        rows = [_measure("Frechet distance", self.frechet, significant)]
        if self.relative is not None:
            rows.append(_measure("of the baseline", self.relative.baseline, significant))
            together = "images of a seed drawn anew together" if self.relative.paired else ""
            rows.append(_measure("as a share of that", self.relative.ratio, number, together))
        kernel, same, shares = self.kernel, self.same_seed, self.class_agreement
        subsets = f"standard deviation {significant(kernel.std)} over {kernel.subsets} subsets of {kernel.subset_size}"
        rows.append(Measure("Kernel distance", significant(kernel.value), "", subsets))
        rows += [_measure("Precision %", self.precision, percent), _measure("Recall %", self.recall, percent)]
        if shares is not None:
            named = {
                "In their class %": shares.images,
                "beside %": shares.reference,
            }
            rows += [_measure(name, value, percent) for name, value in named.items() if value is not None]
            if shares.difference is not None:
                rows.append(_measure("difference, points", shares.difference, signed_percent))
        if same is not None:
            pairs = f"{count(same.pairs)} pairs of the same seed, {same.identical} of them identical"
            far = f"1: two other images; {pairs}"
            of_pairs = (
                ("PSNR [dB]", same.psnr, number, pairs),
                ("SSIM", same.ssim, number, pairs),
                ("Distance of features", same.feature_distance, number, far),
                ("Same class %", same.same_class, percent, pairs),
            )
            rows += [_measure(name, found, form, about) for name, found, form, about in of_pairs if found is not None]
        return rows

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


def _measure(name: str, found: EstimateRow, form: Callable[[float], str], remark: str = "") -> Measure:
    return Measure(name, form(found.value), interval(found.low, found.high, form), remark)
