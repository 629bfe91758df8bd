"""What is suspicious about the images of a set, and what is said of their reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from synthquant.core.progress import Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.scan import ImageScan

_LOOKED_AT = 1024
_LOOKED_AT_TOGETHER = 64


def warn_of_suspicious(images: ImageSet, progress: Progress, source: str) -> dict[str, Any]:
    """Warn about black, constant and similar images among the first 1,024 of a set that no method made.

    Returns `suspicious` for JSON: how many of how many (`looked_at`) are of each kind.
    """
    if images.manifest.method is not None:  # they were looked at when they were made
        return {}
    scan = ImageScan()
    for batch in images.batches(_LOOKED_AT_TOGETHER, range(min(len(images), _LOOKED_AT))):
        scan.add(batch.images, batch.indices)
    report = scan.report()
    for warning in report.warnings():
        progress.warn(f"{source}: {warning}")
    kinds = {kind: found for kind, found in report.model_dump(mode="json").items() if isinstance(found, list)}
    return {"suspicious": {"looked_at": report.count} | {kind: len(found) for kind, found in kinds.items()}}


def outside_in_words(images: ImageSet) -> str:
    """Say what share of the values of a set lies beyond black and white, as it was counted; empty if none does."""
    statistics = images.manifest.statistics
    if statistics is None or not statistics.outside:
        return ""
    return (
        f"{statistics.outside:.1%} of values beyond black and white ({statistics.min:.2f} to {statistics.max:.2f});"
        " they are cut off where images are used to quantize"
    )


def say_what_was_read(images: ImageSet, progress: Progress, source: str = "") -> dict[str, Any]:
    """Warn about the images set aside so far and say what was changed on reading, each once; return it for JSON.

    Args:
        images: a set after its images were read.
        progress: takes the messages.
        source: where the images come from, for a command that reads several sets.

    Returns:
        `set_aside_count`; `set_aside`, the `name` and `reason` of each; and `changed`, the number of images for each
        kind of change (`turned as its EXIF data says`, ...).
    """
    where = f" (in {source})" if source else ""
    aside = images.set_aside
    if aside:
        counted = f"{len(aside)} image{'s' if len(aside) > 1 else ''} set aside"
        _tell_once(images, progress.warn, f"{counted}, for example {aside[0].name}: {aside[0].reason}", where)
    changed = {change: len(names) for change, names in sorted(images.notes.changed.items())}
    for change, count in changed.items():
        example = next(iter(images.notes.changed[change].values()))
        counted = f"{count} image{'s' if count > 1 else ''}"
        _tell_once(images, progress.say, f"{counted} read with a change: {change}, for example {example}", where)
    return {
        "set_aside_count": len(aside),
        "set_aside": [{"name": one.name, "reason": one.reason} for one in aside],
        "changed": changed,
    }


def _tell_once(images: ImageSet, tell: Callable[[str], None], text: str, where: str) -> None:
    if text not in images.notes.told:
        images.notes.told.add(text)
        tell(f"{text}{where}")
