"""Q-Diffusion's calibration data: what a diffusion model samples of itself, recorded at steps of its sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.tensor_file import digest_of
from synthquant.data.store import ImageForm
from synthquant.diffusion.denoiser import Denoiser
from synthquant.diffusion.library import Precision
from synthquant.diffusion.pipelines import Conditions, DiffusionPipeline, Sampling
from synthquant.diffusion.trajectory import Trajectory
from synthquant.diffusion.trajectory_form import Form, form_of, packed
from synthquant.diffusion.trajectory_manifest import Storage, TrajectoryManifest, TrajectoryPart
from synthquant.diffusion.trajectory_writer import TrajectoryWriter
from synthquant.methods import SYNTHESIZERS
from synthquant.models.signature import Inputs
from synthquant.synthesize.batches import batch_sizes
from synthquant.synthesize.conditions import SamplerSettings

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.models.float_model import FloatModel

Which = Literal["uniform", "first", "middle", "last", "normal"]

_NAME = "self_sampling"
# Of a normal distribution of steps, in shares of all of them.
_DEVIATION = 1 / 6


@SYNTHESIZERS.register(_NAME)
class SelfSampling(SamplerSettings):
    """Q-Diffusion (arXiv:2302.04304), section 4.2: what a diffusion pipeline's own sampler gives its denoiser.

    A set of N rows is N / c images at each of c of the sampler's steps; where c does not divide N, the first steps have
    an image more. Classifier-free guidance gives the denoiser each of them twice, without condition and with it, and
    both are rows. The published rule takes every floor(T / c)-th of T steps, which are more than c where c does not
    divide T; here they are c, as evenly spread. An image depends on its number, its condition and the seed: not on the
    images that are sampled with it, but for rounding.
    """

    makes_images: ClassVar[bool] = False
    needs_batch_norm: ClassVar[bool] = False
    form: ClassVar[ImageForm] = ImageForm(framing="raw", sized_by_network=False)

    sampler_steps: int = Field(default=50, ge=1)
    """Steps of the sampler."""

    steps: int | None = Field(default=20, ge=1)
    """How many of them are recorded; none: all."""

    which: Which = "uniform"
    """Which: spread evenly from the first one on, as published; a window of the first, middle or last ones; or drawn
    from a normal distribution around the middle, with a sixth of all steps as its deviation (after PTQ4DM,
    arXiv:2211.15736)."""

    batch_size: int = Field(default=16, ge=1)
    """Images sampled together, and images in one part on disk. Changes a row by rounding only."""

    dtype: Precision = "float32"
    """Precision of the pipeline while it samples; "auto": float16 on an accelerator, float32 on a CPU."""

    storage: Storage = "float32"
    """Precision of what is kept, but for times."""

    @model_validator(mode="after")
    def _check_sampling(self) -> SelfSampling:
        _ = self.sampling  # raises for a height without a width
        return self

    def synthesize(
        self,
        model: FloatModel,
        count: int,
        rng: Rng,
        *,
        writer: TrajectoryWriter | None = None,
        progress: Progress = QUIET,
    ) -> Trajectory:
        """Record `count` pairs of an image and a step, twice as many rows with guidance.

        Raises:
            UnsupportedModelError: the network is not the denoiser of a diffusion pipeline, or is called in a way that
                no file holds.
            InputError: steps, prompts, labels or other settings that the pipeline does not have; values that are not
                finite.
            DataError: the writer's folder holds a trajectory of another pipeline or scheduler.
        """
        task = self.task(model, count, rng)
        sampler = task.sampler(denoiser_of(model).pipeline)
        return collect(task, lambda pieces: map(sampler.record, pieces), writer, progress)

    def open_writer(self, folder: Path, progress: Progress) -> TrajectoryWriter:
        """Return what writes its parts into a folder."""
        return TrajectoryWriter(folder, progress)

    def task(self, model: FloatModel, count: int, rng: Rng) -> SamplingTask:
        """Return what is to be recorded; runs the denoiser once. Raises as `synthesize`."""
        opened = denoiser_of(model).pipeline
        pipeline, sampling = self.sampled(opened), self.sampling
        probe = self.conditions(pipeline, 1, rng)
        seen = pipeline.record(probe, [0], sampling, {0})[0]
        timesteps = pipeline.timesteps
        steps = self.chosen(len(timesteps), rng)
        if count < len(steps):
            raise InputError(f"count is {count} and {len(steps)} steps are recorded, each at least once; ask for more")
        images = -(-count // len(steps))
        conditions = self.conditions(pipeline, images, rng)
        seeds = tuple(rng.seed_for(f"noise of image {number}") for number in range(images))
        manifest = TrajectoryManifest(
            method=_NAME,
            settings=self.model_dump(mode="json"),
            seed=rng.seed,
            source=model.source.source,
            pipeline=opened.fingerprint,
            scheduler=pipeline.scheduler,
            sampler_steps=self.sampler_steps,
            timesteps=tuple(timesteps),
            steps=steps,
            guidance=pipeline.guidance(sampling),
            count=count,
            repeats=len(seen),
            rows=count * len(seen),
            seeds=seeds,
            conditions=None if conditions is None else tuple(conditions),
            storage=self.storage,
            arguments=form_of(seen),
        )
        cut = [text for text in dict.fromkeys(conditions or ()) if isinstance(text, str) and pipeline.is_cut(text)]
        return SamplingTask(self, manifest, tuple(cut))

    @property
    def sampling(self) -> Sampling:
        """How images are drawn."""
        return self.sampled_in(self.sampler_steps)

    def sampled(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """The pipeline with the scheduler and in the precision of the settings."""
        other = pipeline if self.scheduler is None else pipeline.with_scheduler(self.scheduler)
        return other.in_precision(self.dtype)

    def chosen(self, total: int, rng: Rng) -> tuple[int, ...]:
        """Return which of `total` steps are recorded, ascending; raises `InputError` if there are fewer."""
        count = total if self.steps is None else self.steps
        if count > total:
            raise InputError(f"steps is {count} and the sampler makes {total}; record fewer, or raise sampler_steps")
        if self.which == "normal":
            middle, apart = (total - 1) / 2, total * _DEVIATION
            weights = torch.exp(-0.5 * ((torch.arange(total, dtype=torch.float64) - middle) / apart) ** 2)
            drawn = torch.multinomial(weights, count, generator=rng.generator("steps"))
            return tuple(sorted(drawn.tolist()))
        if self.which == "uniform":
            return tuple(number * total // count for number in range(count))
        start = {"first": 0, "middle": (total - count) // 2, "last": total - count}[self.which]
        return tuple(range(start, start + count))


Piece = tuple[Conditions, Sequence[int]]
"""Conditions and seeds of images that are sampled together."""
Packed = tuple[Form, int, dict[str, Tensor]]
"""How arguments are made of tensors, the rows of an image and step, and the tensors of a part."""


@dataclass(frozen=True)
class SamplingTask:
    """A trajectory that is to be recorded: all that a worker needs to know."""

    method: SelfSampling
    """How."""
    manifest: TrajectoryManifest
    """What it is."""
    cut: tuple[str, ...] = ()
    """Prompts whose end the text encoder does not see."""

    @property
    def sizes(self) -> list[int]:
        """Images of each part."""
        return batch_sizes(len(self.manifest.seeds), self.method.batch_size)

    def piece(self, part: int) -> Piece:
        """Return what a part is made of."""
        start = part * self.method.batch_size
        own = slice(start, start + self.method.batch_size)
        conditions = self.manifest.conditions
        return None if conditions is None else conditions[own], self.manifest.seeds[own]

    def sampler(self, pipeline: DiffusionPipeline) -> Sampler:
        """Return what records it with a pipeline as it was opened."""
        sampled = self.method.sampled(pipeline)
        return Sampler(sampled, self.method.sampling, self.manifest.steps, getattr(torch, self.manifest.storage))


@dataclass(frozen=True)
class Sampler:
    """Samples images and keeps what the denoiser was given at some steps."""

    pipeline: DiffusionPipeline
    sampling: Sampling
    steps: tuple[int, ...]
    storage: torch.dtype

    def record(self, piece: Piece) -> Packed:
        """Return a part; raises `InputError` if values are not finite."""
        conditions, seeds = piece
        found = self.pipeline.record(conditions, seeds, self.sampling, self.steps)
        calls = [found[step] for step in self.steps]
        for step, inputs in zip(self.steps, calls, strict=True):
            if not inputs.finite:
                raise InputError(
                    f"{self.pipeline.name} gives values that are not finite at step {step} of its sampler; try another"
                    " dtype, or look at the images that it draws"
                )
        return _one_form(calls), len(calls[0]) // len(seeds), packed(calls, len(seeds), self.storage)


def _one_form(calls: Sequence[Inputs]) -> Form:
    forms = [form_of(inputs) for inputs in calls]
    if any(form != forms[0] for form in forms) or len({len(inputs) for inputs in calls}) > 1:
        raise UnsupportedModelError(
            "the denoiser is given other arguments at other steps of the sampler, which one calibration set cannot hold"
        )
    return forms[0]


def collect(
    task: SamplingTask,
    record: Callable[[Iterable[Piece]], Iterator[Packed]],
    writer: TrajectoryWriter | None,
    progress: Progress,
) -> Trajectory:
    """Record every part that is not on disk yet, and return the trajectory; `record` makes parts in order."""
    manifest, sizes = task.manifest, task.sizes
    missing = list(range(len(sizes))) if writer is None else writer.begin(manifest, sizes)
    if task.cut and missing:
        progress.warn(f"{len(task.cut)} prompts are longer than the text encoder reads: {task.cut[0]!r}")
    kept: list[dict[str, Tensor]] = []
    with progress.bar(f"{_NAME}, {len(manifest.steps)} of {len(manifest.timesteps)} steps", sum(sizes)) as bar:
        bar.advance(sum(sizes) - sum(sizes[index] for index in missing))
        pieces = (task.piece(index) for index in missing)
        for index, (form, repeats, tensors) in zip(missing, record(pieces), strict=True):
            if form != manifest.arguments or repeats != manifest.repeats:
                raise UnsupportedModelError("the denoiser is given other arguments for other images of the sampler")
            if writer is None:
                kept.append(tensors)
            else:
                writer.append(index, tensors)
            bar.advance(sizes[index])
    if writer is not None:
        return writer.finish()
    parts = tuple(_in_memory(index, sizes[index], tensors) for index, tensors in enumerate(kept))
    return Trajectory(manifest.model_copy(update={"parts": parts}), kept)


def _in_memory(index: int, images: int, tensors: dict[str, Tensor]) -> TrajectoryPart:
    """What a part that is in no file is called."""
    return TrajectoryPart(name=f"part-{index:05d}.safetensors", images=images, sha256=digest_of(tensors))


def denoiser_of(model: FloatModel) -> Denoiser:
    """Return the network as a denoiser; raises `UnsupportedModelError` if it is none."""
    if not isinstance(model, Denoiser):
        raise UnsupportedModelError(
            f"{model.name} is no diffusion pipeline, whose sampler {_NAME} records; give diffusers/REPO_OR_FOLDER, or"
            " use another method"
        )
    return model
