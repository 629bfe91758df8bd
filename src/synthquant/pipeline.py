"""The whole flow: open the network, get images, choose from them, quantize, measure, write everything down.

A run is a folder. Of several processes that a launcher started the first one does all of it, and the others train with
it. Each finished stage is marked in its `run.json`, and the same call on the same folder goes on after
the last finished part, unit or stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from synthquant.core.differences import flat
from synthquant.core.errors import InputError
from synthquant.core.files import require_outside, sha256_file, write_text
from synthquant.core.processes import Followers, Processes, follow, joined
from synthquant.core.progress import QUIET, Progress, Silent
from synthquant.core.record import RunRecord
from synthquant.core.run_folder import RunFolder, images_of
from synthquant.core.working_folder import require_space, working_folder
from synthquant.data.image_set import ImageSet
from synthquant.export.model_card import CARD_NAME, checkpoint_card
from synthquant.make import finetune, given_images, received
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
        OtherProcessError: of several processes that fine-tune together another one failed.
        MissingExtraError: a package is missing that the network or the images need.
    """
    with joined(recipe.device) as (processes, device):
        if processes.count > 1:
            _require_together(recipe, processes)
        if not processes.is_first:
            record = follow(processes, lambda parts: _with_first(recipe, Path(out), device, parts))
            return RunRecord.model_validate_json(record)
        followers = Followers(processes)
        with followers.led() as dismiss:
            done = _run(recipe, Path(out), device, progress, followers)
            dismiss(done.model_dump_json())
            return done


def _run(recipe: Recipe, out: Path, device: str, progress: Progress, followers: Followers) -> RunRecord:
    stages = stages_of(recipe)
    given = recipe.images.source if isinstance(recipe.images, SourceSection) else None
    require_outside(out, (given, recipe.quantize.run, recipe.evaluate.data if recipe.evaluate else None))
    with working_folder(out, _WORTHLESS):
        folder = RunFolder(out, recipe.resolved(), device=device, seed=recipe.seed, place=_PLACE)
        take_back_what_is_gone(folder, stages, progress)
        is_done = all(folder.is_done(stage.name) for stage in stages)
        if is_done and folder.is_done("report"):
            progress.say(f"{out}: this run is finished; its results are read from there")
        else:
            if not is_done:
                _do_stages(stages, folder, recipe, device, progress, followers)
            # with what was measured, which the stage that wrote the checkpoint did not know
            write_text(folder.checkpoint / CARD_NAME, checkpoint_card(folder.path))
        write_recipe(folder, recipe)
        if not folder.is_done("report"):
            with folder.stage("report") as metrics:
                write_report([folder.path], folder.report, progress)
                metrics["sha256"] = sha256_file(folder.report)
        shutil.rmtree(folder.work, ignore_errors=True)
        return folder.record


def _require_together(recipe: Recipe, processes: Processes) -> None:
    """Raise `InputError` if several processes have nothing to share, or were given different recipes."""

    def check() -> None:
        if recipe.finetune is None:
            raise InputError(
                f"{processes.count} processes were started, and only fine-tuning is shared by several; start this"
                " without torchrun or accelerate launch"
            )

    processes.together(check)
    settings = {name: repr(value) for name, value in flat(recipe.resolved()).items() if name not in _PLACE}
    processes.require_same(settings)


def _with_first(recipe: Recipe, out: Path, device: str, parts: Mapping[str, Any]) -> Callable[[], object]:
    """Return the training beside the first process, from the network that it sent and on the same images."""
    assert recipe.finetune is not None
    model = open_model(recipe.model, device=device, progress=Silent())
    if isinstance(recipe.images, SourceSection) and recipe.select is None:
        given = given_images(recipe.images, model, recipe.seed, Silent())
        images = given if isinstance(given, ImageSet) else None
    else:
        made = images_of(out)
        if made is None and recipe.images is not None:
            raise InputError(f"{out} has no images here; processes on several machines need a disk that they share")
        images = None if made is None else ImageSet.open(made)
    return partial(finetune, received(model, parts), recipe.finetune, images, recipe.seed, Silent())


def _do_stages(
    stages: Sequence[Stage],
    folder: RunFolder,
    recipe: Recipe,
    device: str,
    progress: Progress,
    followers: Followers,
) -> None:
    """Check all that can be known before any work, then do the stages that are not done."""
    state = Run(
        folder, recipe, open_model(recipe.model, device=device, progress=progress), progress, followers=followers
    )
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
