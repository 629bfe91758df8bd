"""Sets of images that a diffusion pipeline draws, float or quantized: equal seeds give both the same noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from torch.utils import _pytree as pytree

from synthquant.core.errors import InputError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.rng import Rng
from synthquant.core.working_folder import working_folder
from synthquant.data.image_set import ImageSet
from synthquant.data.sampler_steps import STEPS_NAME, SamplerSteps
from synthquant.data.store import JOURNAL_NAME, ImageSetWriter
from synthquant.diffusion.pipelines import Conditions, DiffusionPipeline, Sampling
from synthquant.diffusion.quantized import calibration_of, static_timesteps
from synthquant.models.signature import Inputs
from synthquant.synthesize.batches import batch_sizes
from synthquant.synthesize.conditions import SamplerSettings

_METHOD = "sample"


class SampleSettings(SamplerSettings):
    """How a pipeline draws a set of images."""

    steps: int = Field(default=50, ge=1)
    """Steps of the sampler."""

    batch_size: int = Field(default=16, ge=1)
    """Images drawn together, and images in one part on disk. Changes an image by rounding only."""

    keep_steps: int = Field(default=0, ge=0)
    """Of how many images, from the first on, what the denoiser was given at every step is kept beside the set, so that
    `compare` shows how the error grows. They are drawn twice."""

    @property
    def sampling(self) -> Sampling:
        """How images are drawn."""
        return self.sampled_in(self.steps)


def sample(
    pipeline: DiffusionPipeline,
    settings: SampleSettings,
    count: int,
    seed: int,
    folder: Path,
    progress: Progress = QUIET,
) -> ImageSet:
    """Draw `count` images into `folder`, part by part; called again, draw the parts that are missing.

    Each has its `seed`, its `prompt` if the pipeline reads prompts, and its label if it was drawn for a class. Image,
    condition and seed depend on its number and on `seed` alone, so that a quantized pipeline starts from the noise that
    the float one starts from.

    Raises:
        InputError: the pipeline cannot draw like that.
        DataError: `folder` holds images of another pipeline, setting or seed.
        OutputError: `folder` cannot be written.
    """
    rng = Rng(seed).child(_METHOD)
    used = pipeline if settings.scheduler is None else pipeline.with_scheduler(settings.scheduler)
    conditions, labels = settings.conditions(used, count, rng), settings.labels_for(used, count, rng)
    seeds = [rng.seed_for(f"noise of image {number}") for number in range(count)]
    _warn_of_cut_prompts(used, conditions, progress)
    with working_folder(folder, (JOURNAL_NAME,)):
        writer = ImageSetWriter(
            folder,
            method=_METHOD,
            settings=settings.model_dump(mode="json"),
            seed=seed,
            model_fingerprint=used.fingerprint,
            image_size=None,
            target_count=count,
            dtype="uint8",
            framing="raw",
            progress=progress,
        )
        _draw_missing(used, settings, conditions, labels, seeds, writer, progress)
        kept = min(settings.keep_steps, count)
        if kept and not (folder / STEPS_NAME).is_file():
            _steps(used, settings, conditions, seeds[:kept], progress).write(folder)
        return writer.finish(progress)


def warn_of_other_steps(source: str, pipeline: DiffusionPipeline, settings: SampleSettings, progress: Progress) -> None:
    """Warn if a quantized pipeline is sampled in another way than its ranges were set for.

    More or fewer steps of the same sampler give the denoiser other times than it was calibrated on.

    Raises `InputError` where that is not harmless: static ranges of differences belong to their steps.
    """
    static = static_timesteps(pipeline)
    if static and settings.steps != len(static):
        raise InputError(
            f"{source} has static ranges of the differences between {len(static)} steps of its sampler; sample with"
            f" --steps {len(static)}, or quantize with scheme.modulation.ranges=dynamic"
        )
    known = calibration_of(source)
    if known is None:
        return
    scheduler = (
        pipeline.scheduler if settings.scheduler is None else pipeline.with_scheduler(settings.scheduler).scheduler
    )
    if known.sampler_steps != settings.steps:
        progress.warn(
            f"{source} was calibrated on {known.sampler_steps} steps of the sampler and is sampled with"
            f" {settings.steps}: its ranges are of other times"
        )
    if known.scheduler != scheduler["class"]:
        progress.warn(
            f"{source} was calibrated with {known.scheduler} and is sampled with {scheduler['class']}: its ranges are"
            " of other images"
        )


def _draw_missing(
    pipeline: DiffusionPipeline,
    settings: SampleSettings,
    conditions: Conditions,
    labels: list[int] | None,
    seeds: list[int],
    writer: ImageSetWriter,
    progress: Progress,
) -> None:
    sizes = batch_sizes(len(seeds), settings.batch_size)
    broken = 0
    with progress.bar(f"sample {pipeline.name}", len(seeds)) as bar:
        missing = writer.missing_parts(len(sizes))
        bar.advance(len(seeds) - sum(sizes[part] for part in missing))
        for part in missing:
            start = part * settings.batch_size
            own = slice(start, start + sizes[part])
            some = None if conditions is None else conditions[own]
            drawn = pipeline.draw(some, seeds[own], settings.sampling)
            broken += drawn.finite.count(False)
            columns: dict[str, list[int] | list[str]] = {"seed": seeds[own]}
            if pipeline.conditioning == "prompts" and some is not None:
                columns["prompt"] = [str(prompt) for prompt in some]
            writer.append(drawn.images, None if labels is None else torch.tensor(labels[own]), columns)
            bar.advance(sizes[part])
    if broken:
        progress.warn(f"{broken} images held values that are not finite, which are black")


def _steps(
    pipeline: DiffusionPipeline, settings: SampleSettings, conditions: Conditions, seeds: list[int], progress: Progress
) -> SamplerSteps:
    """What the denoiser is given at every step, of images that are drawn again."""
    found: list[Tensor] = []
    times = torch.empty(0)
    with progress.bar("steps of the sampler", len(seeds)) as bar:
        for start in range(0, len(seeds), settings.batch_size):
            own = slice(start, start + settings.batch_size)
            some, chosen = (
                None if conditions is None else conditions[own.start : own.start + len(seeds[own])],
                seeds[own],
            )
            recorded = pipeline.record(some, chosen, settings.sampling, range(settings.steps))
            # With guidance all rows come twice, of the same images.
            found.append(torch.stack([_images(recorded[step])[: len(chosen)] for step in sorted(recorded)]))
            times = torch.tensor([_time(recorded[step]) for step in sorted(recorded)], dtype=torch.float64)
            bar.advance(len(chosen))
    return SamplerSteps(torch.cat(found, dim=1), times, torch.tensor(seeds))


def _images(inputs: Inputs) -> Tensor:
    return next(leaf for leaf in inputs.tensors if leaf.ndim > 1).float()


def _time(inputs: Inputs) -> float:
    leaves = [leaf for leaf in pytree.tree_leaves(inputs.kwargs.get("timestep")) if isinstance(leaf, Tensor)]
    return float(leaves[0].reshape(-1)[0]) if leaves else float("nan")


def _warn_of_cut_prompts(pipeline: DiffusionPipeline, conditions: Conditions, progress: Progress) -> None:
    is_cut: Callable[[str], bool] = pipeline.is_cut
    cut = [text for text in dict.fromkeys(conditions or ()) if isinstance(text, str) and is_cut(text)]
    if cut:
        progress.warn(f"{len(cut)} prompts are longer than the text encoder reads: {cut[0]!r}")
