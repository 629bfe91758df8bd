"""What of a run is there and whole: a stage is done only as long as its files are those that it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from synthquant.core.errors import InputError
from synthquant.core.files import empty_folder, sha256_file, write_text
from synthquant.core.progress import Progress
from synthquant.core.run_folder import RunFolder
from synthquant.core.run_metrics import CheckpointMetrics, ImagesMetrics, ReportMetrics, SelectMetrics
from synthquant.data.image_set import ImageSet
from synthquant.data.manifest import MANIFEST_NAME, read_manifest
from synthquant.data.store import JOURNAL_NAME
from synthquant.export.checkpoint import WEIGHTS_NAME, read_config
from synthquant.recipe import Recipe, SynthesizeSection
from synthquant.select.write import selection_metrics

RECIPE_NAME = "recipe.yaml"


def take_back_what_is_gone(folder: RunFolder, recipe: Recipe, progress: Progress) -> None:
    """Let stages whose files are missing or not as they were written be done again, and say so.

    Other stages stay done: what they wrote was made from files that are then made again with the same bytes.
    """
    checks: dict[str, tuple[Path, Callable[[RunFolder], None]]] = {
        "select": (folder.selected, _check_selection),
        "checkpoint": (folder.checkpoint, _check_checkpoint),
        "report": (folder.report, _check_report),
    }
    if isinstance(recipe.images, SynthesizeSection):
        checks = {"images": (folder.images, _check_images), **checks}
    were_done = folder.is_done("images")
    for stage, (path, check) in checks.items():
        if not folder.is_done(stage):
            continue
        try:
            check(folder)
        except InputError as error:
            what = f"is not whole ({error})" if path.exists() else "is gone"
            progress.warn(f"{path} {what}: it is made again")
            folder.reopen(stage)
            if stage == "select" and path.is_dir():  # it would be taken for finished
                empty_folder(path)
    if folder.is_done("images") or not folder.images.is_dir():
        return
    if any(folder.images.iterdir()) and not _says_what_it_is(folder.images):
        # Without them its parts are not known to be those of this run.
        if not were_done:
            progress.warn(f"{folder.images} does not say what it holds ({JOURNAL_NAME} is gone): it is made again")
        empty_folder(folder.images)


def write_recipe(folder: RunFolder, recipe: Recipe) -> None:
    """Write the recipe, if it is not there as it is now."""
    path, text = folder.path / RECIPE_NAME, recipe.to_yaml()
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


def checkpoint_hash(folder: RunFolder) -> str:
    """Return the hash of the run's quantized weights; raises `InputError` if the checkpoint is not whole."""
    config = read_config(folder.checkpoint)
    path = folder.checkpoint / WEIGHTS_NAME
    if not path.is_file():
        raise InputError(f"{path} is missing")
    if sha256_file(path) != config.weights_sha256:
        raise InputError(f"the hash of {path} is another")
    return config.weights_sha256


def _check_images(folder: RunFolder) -> None:
    images = ImageSet.open(folder.images)
    images.verify()
    _require_recorded(images.fingerprint, folder.record.metrics("images", ImagesMetrics).fingerprint)


def _check_selection(folder: RunFolder) -> None:
    images = ImageSet.open(folder.selected)
    images.verify()
    selection_metrics(folder.selected)
    _require_recorded(images.fingerprint, folder.record.metrics("select", SelectMetrics).fingerprint)


def _check_checkpoint(folder: RunFolder) -> None:
    recorded = folder.record.metrics("checkpoint", CheckpointMetrics).weights_sha256
    _require_recorded(checkpoint_hash(folder), recorded)


def _check_report(folder: RunFolder) -> None:
    if not folder.report.is_file():
        raise InputError("missing")
    _require_recorded(sha256_file(folder.report), folder.record.metrics("report", ReportMetrics).sha256)


def _require_recorded(found: str, recorded: str | None) -> None:
    """Runs of older releases recorded no hashes."""
    if recorded is not None and found != recorded:
        raise InputError("not what the run wrote there")


def _says_what_it_is(folder: Path) -> bool:
    """Whether an image set, finished or not, can be gone on with."""
    if (folder / JOURNAL_NAME).is_file():
        return True
    try:
        read_manifest(folder)
    except InputError:
        return False
    return (folder / MANIFEST_NAME).is_file()
