"""The part of the page about drawn images: their distances from reference images, and pairs of the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from synthquant.core.errors import InputError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.quality_file import Measure, Quality, as_quality
from synthquant.data.image_set import ImageSet
from synthquant.data.seed_pairs import same_seed_pairs
from synthquant.data.sources import open_images
from synthquant.report import figures
from synthquant.report.sheet import Thumbnail, thumbnail_of

_PAIRS = 18


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
    section = QualitySection(found, found.measures(), names=_short_names(found.beside, found.images))
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
