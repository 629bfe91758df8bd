"""A stage that a recipe adds: the error on images like those that a network was quantized with, which it has not seen.

images: {method: genie_d, count: 256}
held_out: {count: 64}

Far below the error on its own images, it learned those by heart: more of them help. Nothing else of a run depends on
the stage, and it can be added to a run that is finished.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from pydantic import Field

from synthquant.core.advice import about_held_out
from synthquant.core.errors import InputError, RecipeError
from synthquant.core.rng import Rng
from synthquant.core.run_metrics import HeldOutMetrics
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.evaluate.gap import measure_gap
from synthquant.make import undrawn_images
from synthquant.recipe import SourceSection, SynthesizeSection
from synthquant.stages import STAGES, Run, Stage


@STAGES.register("held_out")
class HeldOutStage(Settings, Stage):
    """The error on images held out beside that on the images that the network was quantized with."""

    name: ClassVar[str] = "held_out"
    after: ClassVar[str] = "evaluate"

    count: int = Field(default=64, ge=8)
    """Images that are held out: as many more are made, from other random numbers; of images that exist those that the
    run does not draw."""

    def check(self, run: Run) -> None:
        """Raise `RecipeError` if there can be no images like those that are used, or too few are left of them."""
        recipe = run.recipe
        if recipe.select is not None:
            raise RecipeError("held_out: images that were chosen are not like those left; leave select or held_out out")
        if recipe.images is None or run.model.task == "denoise":
            raise RecipeError("held_out: this run has no set of images of which some could be held out")
        if isinstance(recipe.images, SourceSection):
            left = len(undrawn_images(recipe.images, run.model, recipe.seed, run.progress))
            if left < self.count:
                raise InputError(
                    f"held_out.count is {self.count} but {recipe.images.source} has {left} images beside those that the"
                    " run uses; lower images.count"
                )

    def do(self, run: Run) -> dict[str, Any]:
        """Make them, or draw them, and measure."""
        images, network = run.images, run.quant_model
        assert isinstance(images, ImageSet) and network is not None  # else it was refused before any work
        gap = measure_gap(network, images, self._images(run), float_model=run.model)
        found = asdict(gap)
        if advice := about_held_out(HeldOutMetrics.model_validate(found)):
            run.progress.warn(str(advice))
        run.folder.reopen("report")
        return found

    def _images(self, run: Run) -> ImageSet:
        section, seed = run.recipe.images, run.recipe.seed
        if isinstance(section, SourceSection):
            return undrawn_images(section, run.model, seed, run.progress).subset(range(self.count))
        assert isinstance(section, SynthesizeSection)
        rng = Rng(seed).child("images held out")
        made = section.build().synthesize(run.model, self.count, rng, progress=run.progress)
        assert isinstance(made, ImageSet)  # a network that is no denoiser has no trajectory
        return made
