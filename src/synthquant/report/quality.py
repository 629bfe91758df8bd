"""The part of the page about drawn images: their distances from reference images, and pairs of the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from synthquant.core.errors import InputError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.quality_file import EstimateRow, Quality, as_quality
from synthquant.data.image_set import ImageSet
from synthquant.data.seed_pairs import same_seed_pairs
from synthquant.data.sources import open_images
from synthquant.report import figures
from synthquant.report.formatting import number, percent, significant
from synthquant.report.sheet import Thumbnail, thumbnail_of

_PAIRS = 18


@dataclass(frozen=True)
class Measure:
    """A line of the table."""

    name: str
    value: str
    interval: str
    remark: str = ""


@dataclass
class QualitySection:
    """All that the page shows about a comparison."""

    found: Quality
    measures: list[Measure]
    pairs: list[tuple[Thumbnail, Thumbnail]] = field(default_factory=list)
    """The image beside which each stands, and the image."""
    names: tuple[str, str] = ("", "")
    growth: Markup = field(default_factory=Markup)
    notes: list[str] = field(default_factory=list)


def quality_section(found: Quality, anchor: str) -> QualitySection:
    """Return what the page shows of a comparison; images that are not there any more become a note."""
    section = QualitySection(found, _measures(found), names=_short_names(found.beside, found.images))
    section.growth = figures.error_growth(found.step_errors, f"{anchor}-growth")
    if found.same_seed is not None:
        try:
            section.pairs = _pairs(found.beside, found.images)
        except InputError as error:
            section.notes.append(f"Pairs of the same seed are not shown: {error}")
    return section


def _pairs(beside: str, images: str) -> list[tuple[Thumbnail, Thumbnail]]:
    for source in (beside, images):
        if not source.startswith("bundled/") and not Path(source).expanduser().exists():
            raise InputError(f"{source} is not on this machine")  # a report does not download anything
    sets = open_images(beside), open_images(images)
    pairs = same_seed_pairs(*sets)
    if pairs is None:
        raise InputError(f"{images} and {beside} have no seeds in common any more")
    shown = [index * len(pairs) // min(_PAIRS, len(pairs)) for index in range(min(_PAIRS, len(pairs)))]
    places = pairs.first[shown].tolist(), pairs.second[shown].tolist()
    return [(_shown(sets[0], one), _shown(sets[1], other)) for one, other in zip(*places, strict=True)]


def _shown(images: ImageSet, index: int) -> Thumbnail:
    record = images[index]
    return thumbnail_of(record.image, str(record.columns.get("prompt") or f"seed {record.columns['seed']}"))


def _measures(found: Quality) -> list[Measure]:
    kernel, same, classes = found.kernel, found.same_seed, found.class_agreement
    rows = [_measure("Frechet distance", found.frechet, significant)]
    if found.relative is not None:
        rows.append(_measure("of the baseline", found.relative.baseline, significant))
        together = "images of a seed drawn anew together" if found.relative.paired else ""
        rows.append(_measure("as a share of that", found.relative.ratio, number, together))
    subsets = f"standard deviation {significant(kernel.std)} over {kernel.subsets} subsets of {kernel.subset_size}"
    rows.append(Measure("Kernel distance", significant(kernel.value), "", subsets))
    rows += [_measure("Precision", found.precision, percent, "%"), _measure("Recall", found.recall, percent, "%")]
    if classes is not None:
        named = (("In their class", classes.images), ("beside", classes.reference), ("difference", classes.difference))
        rows += [_measure(name, value, percent, "%") for name, value in named if value is not None]
    if same is not None:
        pairs = f"{same.pairs} pairs of the same seed, {same.identical} of them identical"
        if same.psnr is not None:
            rows.append(_measure("Peak signal-to-noise ratio", same.psnr, number, f"dB; {pairs}"))
        if same.ssim is not None:
            rows.append(_measure("Structural similarity", same.ssim, number, pairs))
        rows.append(_measure("Distance of features", same.feature_distance, number, f"1: two other images; {pairs}"))
        if same.same_class is not None:
            rows.append(_measure("Same class", same.same_class, percent, f"%; {pairs}"))
    return rows


def _measure(name: str, found: EstimateRow, form: Any, remark: str = "") -> Measure:
    return Measure(name, form(found.value), f"{form(found.low)} to {form(found.high)}", remark)


def _short_names(first: str, second: str) -> tuple[str, str]:
    """The shortest ends of two paths that tell them apart."""
    parts: Sequence[tuple[str, ...]] = [Path(one).parts for one in (first, second)]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if names[0] != names[1]:
            return names[0], names[1]
    return first, second


def comparison_section(found: dict[str, Any], progress: Progress = QUIET) -> QualitySection:
    """Return what a page about one comparison shows; raises `InputError` if `found` is none."""
    if not figures.available():
        progress.warn(f"the page has no plots: {figures.NO_PLOTS}")
    return quality_section(as_quality(found, "the comparison"), "comparison")
