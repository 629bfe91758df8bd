"""The part of the page about a selection of images, from the files that the selection left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from pydantic import Field, ValidationError

from synthquant.core.advice import about_selection
from synthquant.core.errors import InputError
from synthquant.core.files import read_sealed_json
from synthquant.core.run_metrics import Row
from synthquant.data.image_set import ImageSet
from synthquant.report import figures
from synthquant.report.sheet import Sheet, make_sheet

SELECTION_NAME = "selection.json"

_MOST_CLASSES_DRAWN = 100


class ModelRow(Row):
    """The network that scored."""

    name: str


class PixelRow(Row):
    """Pixel statistics of a set, of each channel (0..1): red, green, blue where there are three."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class StepRow(Row):
    """What one filter did."""

    method: str
    column: str
    settings: dict[str, Any]
    highest: bool
    entered: int = Field(ge=1)
    kept: int
    edges: tuple[float, ...]
    kept_counts: tuple[int, ...]
    rejected_counts: tuple[int, ...]


class ClassRow(Row):
    """Images of each class, by class number."""

    pool: tuple[int, ...]
    kept: tuple[int, ...]


class GapRow(Row):
    """Distance of sets to each batch norm."""

    layers: tuple[str, ...]
    pool: tuple[float, ...]
    kept: tuple[float, ...]
    real: tuple[float, ...] | None = None


class IdentityRow(Row):
    """What the selection depends on."""

    seed: int


class SelectionFile(Row):
    """`selection.json`."""

    identity: IdentityRow
    model: ModelRow
    pool: int
    unusable: int
    kept: int
    real: int | None = None
    steps: tuple[StepRow, ...]
    classes: ClassRow | None = None
    pixels: dict[str, PixelRow]
    batch_norm: GapRow | None = None
    pool_duplicates: int | None = None


@dataclass(frozen=True)
class SetRow:
    """One set of images in the table."""

    name: str
    count: int | None
    pixels: PixelRow
    distance: float | None
    duplicates: int | None


@dataclass(frozen=True)
class SelectionSection:
    """All that the page shows about a selection."""

    found: SelectionFile
    histograms: list[Markup]
    kept: Sheet
    rejected: Sheet | None
    sets: list[SetRow]
    gaps: Markup
    balance: Markup
    classes: str
    farther: str
    """That the choice moved away from the batch norms, and what to do; empty: it did not, or that is not known."""


def is_selection(folder: Path) -> bool:
    """Return whether a folder holds a selection of images."""
    return (folder / SELECTION_NAME).is_file()


def selection_section(folder: Path, class_names: Sequence[str], anchor: str) -> SelectionSection:
    """Read what a selection left in its folder and draw it.

    Raises:
        InputError: `selection.json` or an image set is missing or damaged.
    """
    path = folder / SELECTION_NAME
    try:
        found = SelectionFile.model_validate(read_sealed_json(path, unsealed={"version": 1}))
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        raise InputError(f"{path}: {where}: {detail['msg']}") from error
    images = ImageSet.open(folder)
    kept = make_sheet(images, None, class_names)
    rejected = None
    if (folder / "rejected").is_dir():
        rejected = make_sheet(ImageSet.open(folder / "rejected"), None, class_names, classes=kept.classes)
    gaps = found.batch_norm
    return SelectionSection(
        found,
        [
            figures.score_histogram(
                step.edges, step.kept_counts, step.rejected_counts, step.column, f"{anchor}-score-{index}"
            )
            for index, step in enumerate(found.steps)
        ],
        kept,
        rejected,
        _sets(found, images),
        Markup() if gaps is None else figures.batch_norm_gaps(gaps.layers, _gap_series(gaps), f"{anchor}-gaps"),
        _balance(found.classes, class_names, f"{anchor}-classes"),
        "" if found.classes is None else _class_text(found.classes),
        _farther(gaps),
    )


def _farther(gaps: GapRow | None) -> str:
    if gaps is None:
        return ""
    text = str(about_selection({"pool": sum(gaps.pool), "kept": sum(gaps.kept)}) or "")
    return text[:1].upper() + text[1:]


def _sets(found: SelectionFile, images: ImageSet) -> list[SetRow]:
    counts = {"pool": found.pool, "kept": found.kept, "real": found.real}
    duplicates = {"pool": found.pool_duplicates, "kept": len(images.manifest.quality.get("duplicate", ()))}
    names = {"pool": "pool", "kept": "kept", "real": "real images"}
    return [
        SetRow(
            name,
            counts[key],
            found.pixels[key],
            None if found.batch_norm is None else sum(getattr(found.batch_norm, key) or ()),
            duplicates.get(key),
        )
        for key, name in names.items()
        if key in found.pixels
    ]


def _gap_series(gaps: GapRow) -> dict[str, tuple[float, ...]]:
    series = {"pool": gaps.pool, "kept": gaps.kept}
    return series if gaps.real is None else series | {"real images": gaps.real}


def _balance(classes: ClassRow | None, class_names: Sequence[str], figure_id: str) -> Markup:
    if classes is None or len(classes.pool) > _MOST_CLASSES_DRAWN:
        return Markup()
    numbers = range(len(classes.pool))
    names = [class_names[number].split(",")[0] if number < len(class_names) else str(number) for number in numbers]
    return figures.class_balance(names, classes.pool, classes.kept, figure_id)


def _class_text(classes: ClassRow) -> str:
    """Say how evenly the classes of the pool are kept."""
    shares = [kept / pool for kept, pool in zip(classes.kept, classes.pool, strict=True) if pool]
    gone = sum(1 for kept, pool in zip(classes.kept, classes.pool, strict=True) if pool and not kept)
    text = f"Of the {len(shares)} classes in the pool, between {100 * min(shares):.0f}% and {100 * max(shares):.0f}%"
    return f"{text} of the images were kept" + (f"; {gone} classes have none left." if gone else ".")
