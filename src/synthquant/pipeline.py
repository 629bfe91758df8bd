"""The whole flow: open the network, get images, choose from them, quantize, measure, write everything down.

A run is a folder. Each finished stage is marked in its `run.json`, and the same call on the same folder goes on after
the last finished part, unit or stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from synthquant.core.device import resolve_device
from synthquant.core.files import require_outside, sha256_file
from synthquant.core.progress import QUIET, Progress
from synthquant.core.record import RunRecord
from synthquant.core.run_folder import RunFolder
from synthquant.core.working_folder import require_space, working_folder
from synthquant.models.open import open_model
from synthquant.recipe import Recipe, SourceSection
from synthquant.report.html import write_report
from synthquant.resume import RECIPE_NAME, take_back_what_is_gone, write_recipe
from synthquant.run_stages import stages_of
from synthquant.stages import Run, Stage

# Where a run is computed, not what: a run may go on with others.
_PLACE = ("device", "memory.device_gib", "memory.host_gib")
# Files that hold nothing but what was asked for.
_WORTHLESS = (RECIPE_NAME, "run.json")


def run(recipe: Recipe, out: str | Path, progress: Progress = QUIET) -> RunRecord:
    """Do what `recipe` says and leave everything in the folder `out`; called again, do what is missing there.

    Raises:
        InputError: the recipe names something that does not exist or does not fit together, or `out` holds another
            run. If nothing of value was made until then, no folder is left behind.
        OutputError: `out` cannot be written, the disk is full, or another process works there. What is finished stays.
        MissingExtraError: a package is missing that the network or the images need.
    """
    device, stages = resolve_device(recipe.device), stages_of(recipe)
    given = recipe.images.source if isinstance(recipe.images, SourceSection) else None
    require_outside(Path(out), (given, recipe.quantize.run, recipe.evaluate.data if recipe.evaluate else None))
    with working_folder(Path(out), _WORTHLESS):
        folder = RunFolder(Path(out), recipe.resolved(), device=device, seed=recipe.seed, place=_PLACE)
        take_back_what_is_gone(folder, stages, progress)
        is_done = all(folder.is_done(stage.name) for stage in stages)
        if is_done and folder.is_done("report"):
            progress.say(f"{out}: this run is finished; its results are read from there")
        elif not is_done:
            _do_stages(stages, folder, recipe, device, progress)
        write_recipe(folder, recipe)
        if not folder.is_done("report"):
            with folder.stage("report") as metrics:
                write_report([folder.path], folder.report, progress)
                metrics["sha256"] = sha256_file(folder.report)
        shutil.rmtree(folder.work, ignore_errors=True)
        return folder.record


def _do_stages(stages: Sequence[Stage], folder: RunFolder, recipe: Recipe, device: str, progress: Progress) -> None:
    """Check all that can be known before any work, then do the stages that are not done."""
    state = Run(folder, recipe, open_model(recipe.model, device=device, progress=progress), progress)
    for stage in stages:
        stage.check(state)
    needed: dict[str, int] = {}
    for stage in stages:
        needed |= stage.space(state)
    require_space(folder.path, needed)
    write_recipe(folder, recipe)
    for stage in stages:
        if stage.is_done(folder):
            stage.take_up(state)
        else:
            with folder.stage(stage.name) as metrics:
                metrics |= stage.do(state)
