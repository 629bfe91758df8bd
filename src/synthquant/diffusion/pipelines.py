"""Pipelines of diffusers, opened by name: conditions and seeds to images and to what denoisers saw."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from synthquant.core.device import resolve_device
from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.core.modules import hooked
from synthquant.core.settings import Settings, is_unset
from synthquant.diffusion.library import (
    DENOISERS,
    FOREIGN_ERRORS,
    Conditioning,
    Precision,
    conditioning_of,
    denoiser_name,
    load_denoiser,
    load_pipeline,
    pipeline_class,
    pipeline_index,
    pipeline_location,
    precision,
    quiet,
    require_no_adapters,
    scheduler_like,
    without_checker,
)
from synthquant.diffusion.quantized import checkpoint_of, load_quantized
from synthquant.diffusion.recording import Enough, Recorder, StandIn, steps_of
from synthquant.diffusion.text_cache import TextCache
from synthquant.models.signature import Inputs
from synthquant.models.weights import one_line

Conditions = Sequence[str] | Sequence[int] | None
"""Prompts, labels, or nothing."""


class Sampling(Settings):
    """How a pipeline draws."""

    steps: int = Field(default=50, ge=1)
    """Steps of the sampler."""

    guidance: float | None = Field(default=None, ge=0)
    """Classifier-free guidance scale; 1 or less draws without guidance, in half the time; none: the pipeline's own."""

    negative_prompt: str = ""
    """What the images should not show; needs guidance."""

    height: int | None = Field(default=None, ge=8)
    """Height of the images in pixels; none: the pipeline's own."""

    width: int | None = Field(default=None, ge=8)
    """Width of the images in pixels; none: the pipeline's own."""

    eta: float | None = Field(default=None, ge=0, le=1, exclude_if=is_unset)
    """Share of fresh noise in each step of DDIM (arXiv:2010.02502): 0 none, 1 as much as DDPM; none: the pipeline's
    own."""

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        if (self.height is None) != (self.width is None):
            raise ValueError(f"give height and width or neither, got height {self.height} and width {self.width}")
        return self


@dataclass(frozen=True)
class Drawn:
    """What a pipeline drew."""

    images: Tensor
    """uint8 `[B, C, H, W]`, on the CPU."""
    unsafe: tuple[bool, ...]
    """Which images the pipeline's safety checker has blanked."""
    finite: tuple[bool, ...]
    """Which images held finite numbers only; what was not is 0 in `images`."""


class DiffusionPipeline:
    """An opened pipeline: conditions and seeds to images. Each image has a random generator of its own."""

    def __init__(self, pipeline: Any, name: str, device: torch.device) -> None:
        """Take a pipeline of diffusers; raises `UnsupportedModelError` if it does not make images of noise."""
        self.pipeline = pipeline
        """The pipeline of diffusers."""
        self.name = name
        """How it was asked for."""
        self.device = device
        """Where it runs."""
        self._parameters = inspect.signature(type(pipeline).__call__).parameters
        self.conditioning: Conditioning = conditioning_of(type(pipeline), name)
        """What it wants to be told of an image."""
        if self.conditioning == "none" and "class_labels" in self._parameters and self.number_of_labels is not None:
            self.conditioning = "labels"  # left out, they are drawn at random by the process
        self._texts = TextCache(pipeline, device)

    @property
    def denoiser_name(self) -> str:
        """What the pipeline calls its denoiser; raises `UnsupportedModelError` if it has none."""
        return denoiser_name({name: getattr(self.pipeline, name, None) for name in DENOISERS}, self.name)

    @property
    def denoiser(self) -> nn.Module:
        """The network that predicts noise; raises `UnsupportedModelError` if there is none."""
        module: nn.Module = getattr(self.pipeline, self.denoiser_name)
        return module

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over the weights as they were loaded, precision included, and the scheduler's
        settings.
        """
        return self._opened

    @cached_property
    def _opened(self) -> str:
        digest = hashlib.sha256(type(self.pipeline).__name__.encode())
        scheduler = self.scheduler
        digest.update(f"{scheduler['class']} {json.dumps(scheduler['settings'], sort_keys=True)}".encode())
        for part, module in sorted(self.pipeline.components.items()):
            for name, value in sorted(module.state_dict().items()) if isinstance(module, nn.Module) else ():
                digest.update(f"{part}.{name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def scheduler(self) -> dict[str, Any]:
        """Class and settings of the scheduler, as plain data."""
        scheduler = self.pipeline.scheduler
        settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        plain = json.loads(json.dumps(settings, default=str))
        return {"class": type(scheduler).__name__, "settings": plain}

    def with_scheduler(self, name: str) -> DiffusionPipeline:
        """Return the same pipeline with another sampler of `SCHEDULERS` or of diffusers, for the same noise schedule.

        Raises `UnknownNameError` if there is none of that name, `InputError` if the pipeline would start it wrongly.
        """
        twin = self._twin()
        twin.pipeline.scheduler = scheduler_like(self.pipeline.scheduler, name)
        # Some samplers want noise of another size to begin with, which only some pipelines give them.
        if "init_noise_sigma" not in inspect.getsource(type(self.pipeline)):
            with quiet():
                twin.pipeline.scheduler.set_timesteps(2)
            if float(getattr(twin.pipeline.scheduler, "init_noise_sigma", 1.0)) != 1.0:
                raise InputError(
                    f"{self.name} ({type(self.pipeline).__name__}) begins with noise of size 1, and the scheduler"
                    f" {name} does not; choose ddim, ddpm, dpm++ or unipc"
                )
        return twin

    def in_precision(self, name: Precision) -> DiffusionPipeline:
        """Return the pipeline in that precision: itself, or a copy of all its networks."""
        dtype = precision(name, self.device)
        if all(part.dtype == dtype for part in self.denoiser.parameters()):
            return self
        twin = DiffusionPipeline(copy.deepcopy(self.pipeline), self.name, self.device)
        with quiet():
            twin.pipeline.to(dtype)
        return twin

    def replaced(self, module: nn.Module) -> DiffusionPipeline:
        """Return the same pipeline with another denoiser, which takes what `normal_form` gives; the rest is shared."""
        twin = self._twin()
        setattr(twin.pipeline, self.denoiser_name, StandIn(module, self.denoiser))
        return twin

    def to(self, device: torch.device | str) -> None:
        """Move all networks."""
        self.device = torch.device(device)
        with quiet():
            self.pipeline.to(self.device)
        self._texts = TextCache(self.pipeline, self.device)

    def draw(self, conditions: Conditions, seeds: Sequence[int], sampling: Sampling) -> Drawn:
        """Draw one image for each seed, all together, with the prompts or labels that the pipeline wants for them.

        An image depends on its condition, its seed and `sampling`; the others drawn with it change it by no more than
        the rounding of sums. Its noise is drawn on the CPU, so that it is the same on every device.

        Raises `InputError` if the pipeline cannot draw like that, for example of that size.
        """
        result = self._call(conditions, seeds, sampling)
        pixels = result.images.float()
        finite = torch.isfinite(pixels).flatten(1).all(1).tolist()
        images = pixels.nan_to_num(0, 0, 0).clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
        unsafe = getattr(result, "nsfw_content_detected", None) or [False] * len(seeds)
        return Drawn(images=images, unsafe=tuple(map(bool, unsafe)), finite=tuple(finite))

    def record(
        self, conditions: Conditions, seeds: Sequence[int], sampling: Sampling, steps: Collection[int]
    ) -> dict[int, Inputs]:
        """Draw as `draw` does and return what the denoiser is given at some of the sampler's steps, on the CPU.

        Rows of images follow each other; with guidance all of them come twice. Drawing ends after the last of these
        steps. Raises as `draw`, and `InputError` for a step that the sampler does not get to.
        """
        recorder = self._watched(Recorder(steps), conditions, seeds, sampling)
        if missing := sorted(set(steps) - set(recorder.found)):
            raise InputError(
                f"{self.name}: the sampler has no step {missing[0]} (counted from 0) at {sampling.steps} steps"
            )
        for inputs in recorder.found.values():
            if len(inputs) % len(seeds):
                raise UnsupportedModelError(
                    f"{self.name} gives its {self.denoiser_name} {len(inputs)} rows for {len(seeds)} images, so that it"
                    " cannot be told which row is of which image"
                )
        return recorder.found

    @property
    def timesteps(self) -> list[float]:
        """The time of each step that the sampler made last."""
        return [float(time) for time in torch.as_tensor(self.pipeline.scheduler.timesteps).tolist()]

    def first_call(self, sampling: Sampling) -> Inputs:
        """Return what the denoiser is given first for one image, before it runs."""
        conditions: dict[Conditioning, Conditions] = {"none": None, "prompts": ["a photo"], "labels": [0]}
        recorder = Recorder({0}, at_first=True)
        self._watched(recorder, conditions[self.conditioning], [0], sampling)
        return recorder.found[0]

    def is_cut(self, prompt: str) -> bool:
        """Return whether a prompt is longer than the text encoder reads, which then sees its beginning only."""
        return self._texts.is_cut(prompt)

    def _watched(
        self, recorder: Recorder, conditions: Conditions, seeds: Sequence[int], sampling: Sampling
    ) -> Recorder:
        with hooked(pre=[(self.denoiser, recorder.see)], with_kwargs=True), suppress(Enough):
            self._call(conditions, seeds, sampling, recorder)
        return recorder

    def _call(
        self, conditions: Conditions, seeds: Sequence[int], sampling: Sampling, recorder: Recorder | None = None
    ) -> Any:
        arguments = self._arguments(conditions, len(seeds), sampling)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        before = None if recorder is None else recorder.end_step
        with quiet(), torch.no_grad(), steps_of(self.pipeline.scheduler, generators, before):
            try:
                return self.pipeline(
                    **arguments, num_inference_steps=sampling.steps, generator=generators, output_type="pt"
                )
            except torch.OutOfMemoryError:
                raise
            except FOREIGN_ERRORS as error:
                raise InputError(f"{self.name} cannot draw: {type(error).__name__}: {one_line(error)}") from error

    def _arguments(self, conditions: Conditions, count: int, sampling: Sampling) -> dict[str, Any]:
        given = {"height": sampling.height, "width": sampling.width, "eta": sampling.eta}
        options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        asked = [*options, *(["negative_prompt"] if sampling.negative_prompt else [])]
        asked += ["guidance_scale"] if sampling.guidance is not None else []
        for key in asked:
            if key not in self._parameters:
                raise InputError(f"{self.name} ({type(self.pipeline).__name__}) takes no {key}; leave it out")
        self._require_scheduler_for(sampling)
        guidance = self.guidance(sampling)
        if guidance is not None:
            options["guidance_scale"] = guidance
        if "batch_size" in self._parameters:
            options["batch_size"] = count
        return options | self._conditions(conditions, count, guidance or 0.0, sampling.negative_prompt)

    def _conditions(self, conditions: Conditions, count: int, guidance: float, negative: str) -> dict[str, Any]:
        if self.conditioning == "none":
            if conditions is not None:
                raise InputError(f"{self.name} is unconditional: it reads no prompts or labels; leave them out")
            return {}
        found = list(conditions or ())
        if not found:
            raise InputError(f"no {self.conditioning} to draw; {self.name} needs one for each image")
        if len(found) != count:
            raise InputError(f"there are {len(found)} {self.conditioning} and {count} seeds; give one for each image")
        if self.conditioning == "prompts":
            prompts = [text for text in found if isinstance(text, str)]
            if len(prompts) < count:
                raise InputError(f"{self.name} reads prompts, which are texts; give one for each image")
            return self._texts.arguments(prompts, guidance, negative)
        labels = [label for label in found if isinstance(label, int)]
        classes = self.number_of_labels
        if len(labels) < count or min(labels) < 0 or (classes is not None and max(labels) >= classes):
            last = "" if classes is None else f" to {classes - 1}"
            raise InputError(f"{self.name} reads labels, which are whole numbers from 0{last}; give one for each image")
        return {"class_labels": labels}

    def guidance(self, sampling: Sampling) -> float | None:
        """Return the scale of classifier-free guidance that it draws with; none if it has no guidance."""
        if "guidance_scale" not in self._parameters:
            return None
        own = self._parameters["guidance_scale"].default
        scale = own if sampling.guidance is None else sampling.guidance
        return float(scale) if isinstance(scale, int | float) else None

    def _require_scheduler_for(self, sampling: Sampling) -> None:
        """Raise `InputError` if the scheduler has fewer steps than that, or nothing to do with `eta`."""
        scheduler = self.pipeline.scheduler
        most = scheduler.config.get("num_train_timesteps")
        if isinstance(most, int) and sampling.steps > most:
            raise InputError(
                f"{sampling.steps} steps are more than the {most} that the scheduler of {self.name} has; ask for fewer"
            )
        if sampling.eta is not None and "eta" not in inspect.signature(scheduler.step).parameters:
            raise InputError(f"the scheduler {type(scheduler).__name__} takes no eta; leave it out, or choose ddim")

    @property
    def number_of_labels(self) -> int | None:
        """Classes that the denoiser tells apart; none if it does not say."""
        config: Mapping[str, Any] = getattr(self.denoiser, "config", {})
        names = ("num_embeds_ada_norm", "num_class_embeds")
        return next((int(config[name]) for name in names if config.get(name) is not None), None)

    def _twin(self) -> DiffusionPipeline:
        return DiffusionPipeline(copy.copy(self.pipeline), self.name, self.device)


def open_pipeline(
    source: str,
    *,
    device: torch.device | str = "cpu",
    dtype: Precision = "float32",
    scheduler: str | None = None,
    safety_checker: bool = False,
    published: bool = True,
) -> DiffusionPipeline:
    """Open a diffusers pipeline that makes images: a folder, `diffusers/NAME`, `zoo/NAME`, or a name on the hub.

    Or a quantized one: the folder of a run, or one that `--to diffusers` wrote.

    Args:
        source: its name. Weights are read from safetensors only.
        device: where it runs.
        dtype: precision; "auto" is float16 on an accelerator and float32 on a CPU.
        scheduler: replaces the pipeline's own, by one of `SCHEDULERS` or of diffusers, with the same noise schedule.
        safety_checker: load the pipeline's one, if it has one.
        published: load the denoiser's weights; otherwise they are random.

    Raises:
        ModelError: there is no such pipeline, it cannot be read, or its denoiser has adapters beside its weights.
        UnsupportedModelError: it makes no images of noise, or has no denoiser.
        UnknownNameError: there is no such scheduler.
        MissingExtraError: diffusers is not installed.
        InputError: the device cannot be used, or the scheduler does not go with the pipeline.
    """
    place = torch.device(resolve_device(str(device)))
    if published and checkpoint_of(source) is not None:
        quantized = DiffusionPipeline(load_quantized(source, place, dtype), source, place)
        return quantized if scheduler is None else quantized.with_scheduler(scheduler)
    location = pipeline_location(source)
    index = pipeline_index(location, source)
    cls = pipeline_class(index, source)
    conditioning_of(cls, source)
    parts = {name: value for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    name, kind = denoiser_name(parts, source), precision(dtype, place)
    options = {"dtype": kind, name: load_denoiser(index, name, location, source, kind, published=published)}
    pipeline = load_pipeline(cls, location, source, **options, **without_checker(cls, safety_checker))
    require_no_adapters(getattr(pipeline, name), f"the {name} of {source}")
    pipeline.set_progress_bar_config(disable=True)
    opened = DiffusionPipeline(pipeline, source, place)
    opened.to(place)
    return opened if scheduler is None else opened.with_scheduler(scheduler)
