"""A diffusion pipeline opened as a network: its denoiser, with the pipeline around it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from synthquant.core.errors import DataError, ModelError
from synthquant.diffusion.pipelines import DiffusionPipeline, Sampling, open_pipeline
from synthquant.diffusion.quantized import require_float
from synthquant.diffusion.trajectory import Trajectory
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.opened import OPENERS, Opened

# The first of them is looked at; some samplers have no schedule of a single step.
_FEW_STEPS = 2


@dataclass(frozen=True)
class Denoiser(FloatModel):
    """The network of a diffusion pipeline that predicts noise.

    `module` is the pipeline's own `unet` or `transformer`, and `takes` is what a sampler really gave it.
    """

    pipeline: DiffusionPipeline = field(kw_only=True)
    """All of the pipeline; its other networks stay in floating point."""

    def taking(self, trajectory: Trajectory) -> Denoiser:
        """The same, with the arguments of a trajectory as the example of its own: of its size, and in its form.

        Raises `DataError` if the trajectory is one of another pipeline.
        """
        recorded = trajectory.manifest
        if recorded.pipeline != self.pipeline.fingerprint:
            raise DataError(
                f"{trajectory.name} is a trajectory of another pipeline ({recorded.source}, whose fingerprint is"
                f" {recorded.pipeline[:8]}...) than {self.source.source} ({self.pipeline.fingerprint[:8]}...); record"
                " one with self_sampling"
            )
        return replace(self, takes=next(trajectory.batches(recorded.repeats)))

    def to(self, device: torch.device | str) -> Denoiser:
        """The same on `device`. The pipeline itself moves, so the old value is on `device` too."""
        self.pipeline.to(device)
        return replace(self, module=self.pipeline.denoiser)


@OPENERS.register("diffusers")
def open_denoiser(name: str, request: ModelSource, published: bool) -> Opened:
    """Open `diffusers/REPO_OR_FOLDER`, a folder of a pipeline, or a bundled one, in float32.

    Raises what `open_pipeline` does, and `ModelError` for settings of classifiers, which would do nothing.
    """
    if request.num_classes is not None or request.task not in ("classify", "denoise"):
        raise ModelError(
            f"{request.source} is a diffusion pipeline, whose denoiser predicts noise; leave --num-classes and --task"
            " out"
        )
    if published:
        require_float(request.source)
    pipeline = open_pipeline(request.source, published=published)
    example = pipeline.first_call(Sampling(steps=_FEW_STEPS))
    return Opened(pipeline.denoiser, example=example, task="denoise", make=partial(Denoiser, pipeline=pipeline))
