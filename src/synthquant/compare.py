"""Drawn images beside reference images: what the command `compare` finds, and keeps with a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from synthquant.core.device import resolve_device
from synthquant.core.errors import InputError
from synthquant.core.files import write_text
from synthquant.core.progress import QUIET, Progress
from synthquant.core.quality_file import write_quality
from synthquant.core.record import environment
from synthquant.core.rng import Rng
from synthquant.data.codec import MAX_PIXELS
from synthquant.data.image_set import ImageSet
from synthquant.data.quality import say_what_was_read
from synthquant.data.sampler_steps import SamplerSteps
from synthquant.data.sources import open_images
from synthquant.evaluate.image_features import open_features
from synthquant.evaluate.image_quality import QualitySettings, compare_images
from synthquant.evaluate.step_errors import step_errors
from synthquant.export.model_card import CARD_NAME, checkpoint_card

DEFAULT_FEATURES = "zoo/cifar10-resnet20"
"""The bundled classifier: it tells pictures of 32x32 apart."""
# What may differ between sets whose pairs tell what quantization did.
_OF_THE_NETWORK = ("model", "batch_size", "device", "dtype", "keep_steps")


def compare(
    images: str,
    reference: str,
    *,
    baseline: str | None = None,
    features: str = DEFAULT_FEATURES,
    settings: QualitySettings | None = None,
    max_pixels: int = MAX_PIXELS,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Compare image sets, each in any form that `open_images` takes.

    Args:
        images: what is judged.
        reference: real images, or those of the float pipeline.
        baseline: images of the float pipeline where the reference is real: the distance is put in relation to theirs,
            and pairs of the same seed are with them.
        features: `inception`, or a classifier as `open_model` takes it.
        settings: how much is drawn for intervals and subsets.
        max_pixels: images of more pixels are set aside.
        device: where features are computed.
        seed: of what is drawn.
        progress: takes bars and warnings.

    Returns:
        The fields of `ImageQuality` as JSON values, `step_errors` (fields of `StepError`; empty unless both sets keep
        what their samplers were given), and `images`, `reference`, `baseline`, `seed`, `settings`,
        `environment`.

    Raises:
        DataError: images cannot be used, or are too few.
        ModelError: the features cannot be had.
        MissingExtraError: a package is not installed.
    """
    how, place = settings or QualitySettings(), resolve_device(device)
    names = {"images": images, "reference": reference, "baseline": baseline}
    sets = {name: open_images(source, max_pixels=max_pixels) for name, source in names.items() if source is not None}
    found = compare_images(
        sets["images"],
        sets["reference"],
        open_features(features, place, progress),
        baseline=sets.get("baseline"),
        names={name: source for name, source in names.items() if source is not None},
        settings=how,
        rng=Rng(seed),
        progress=progress,
    )
    for name, one in sets.items():
        say_what_was_read(one, progress, names[name] or name)
    beside = sets.get("baseline", sets["reference"])
    if found.same_seed is not None and (other := _other_sampling(sets["images"], beside)):
        progress.warn(
            f"images of the same seed were drawn with other settings ({other}), which is part of their distance"
        )
    kept = [SamplerSteps.read(one.folder) for one in (sets["images"], beside)]
    return {
        **names,
        **found.row(),
        "step_errors": [asdict(one) for one in step_errors(kept[0], kept[1])],
        "seed": seed,
        "settings": how.model_dump(mode="json"),
        "environment": environment(place),
    }


def keep_with_run(found: dict[str, Any], run: Path) -> Path:
    """Write what `compare` found into a run's folder, where reports look for it, and its model card; returns the file.

    Raises `InputError` if the folder is no run's.
    """
    require_run(run)
    kept = write_quality(run, found)
    if (run / "model" / CARD_NAME).is_file():
        write_text(run / "model" / CARD_NAME, checkpoint_card(run))
    return kept


def require_run(run: Path) -> None:
    """Raise `InputError` unless the folder is that of a run."""
    if not (run / "run.json").is_file():
        raise InputError(f"{run} is not the folder of a run: it has no run.json; give one that synthquant made")


def _other_sampling(first: ImageSet, second: ImageSet) -> str:
    """Settings besides the network that two sets were drawn with and that differ, as `steps 100 and 50`."""
    one, two = first.manifest.settings, second.manifest.settings
    keys = [key for key in one if key in two and one[key] != two[key] and key not in _OF_THE_NETWORK]
    return ", ".join(f"{key} {one[key]} and {two[key]}" for key in keys)
