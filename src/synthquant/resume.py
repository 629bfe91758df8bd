"""What of a run is there and whole: a stage is done only as long as its files are those that it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from synthquant.core.errors import InputError
from synthquant.core.files import empty_folder, sha256_file, write_text
from synthquant.core.progress import Progress
from synthquant.core.run_folder import RunFolder
from synthquant.core.run_metrics import ReportMetrics
from synthquant.data.manifest import MANIFEST_NAME, read_manifest
from synthquant.data.store import JOURNAL_NAME
from synthquant.diffusion.trajectory import is_trajectory
from synthquant.export.quant_config import WEIGHTS_NAME, read_config
from synthquant.recipe import Recipe
from synthquant.stages import Stage

RECIPE_NAME = "recipe.yaml"


def take_back_what_is_gone(folder: RunFolder, stages: Sequence[Stage], progress: Progress) -> None:
    """Let stages whose files are missing or not as they were written be done again, and say so.

    Other stages stay done: what they wrote was made from files that are then made again with the same bytes.
    """
    were_done = folder.is_done("images")
    checks = [(stage.name, path, stage.require_files) for stage in stages if (path := stage.files(folder)) is not None]
    for name, path, check in (*checks, ("report", folder.report, _require_report)):
        if not folder.is_done(name):
            continue
        try:
            check(folder)
        except InputError as error:
            what = f"is not whole ({error})" if path.exists() else "is gone"
            progress.warn(f"{path} {what}: it is made again")
            folder.reopen(name)
            if name == "select" and path.is_dir():  # it would be taken for finished
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


def _require_report(folder: RunFolder) -> None:
    if not folder.report.is_file():
        raise InputError("missing")
    require_recorded(sha256_file(folder.report), folder.record.metrics("report", ReportMetrics).sha256)


def require_recorded(found: str, recorded: str | None) -> None:
    """Raise `InputError` if a hash is not the recorded one; runs of older releases recorded none."""
    if recorded is not None and found != recorded:
        raise InputError("not what the run wrote there")


def _says_what_it_is(folder: Path) -> bool:
    """Whether an image set, finished or not, can be gone on with."""
    if (folder / JOURNAL_NAME).is_file() or is_trajectory(folder):
        return True
    try:
        read_manifest(folder)
    except InputError:
        return False
    return (folder / MANIFEST_NAME).is_file()
