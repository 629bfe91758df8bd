"""What a diffusion pipeline is told of each image that it samples: prompts, labels, or nothing; and its sampler."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field, model_validator

from synthquant.core.errors import DataError, InputError
from synthquant.core.settings import Settings
from synthquant.diffusion.pipelines import Sampling
from synthquant.synthesize.class_names import class_names
from synthquant.synthesize.prompts import TEMPLATES, PromptPlan, require_template

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.diffusion.pipelines import Conditions, DiffusionPipeline


class ConditionSettings(Settings):
    """Of which prompts or labels the images are."""

    prompts: str | tuple[str, ...] = ()
    """Prompts in turns, for a pipeline that reads them: a list, or a text file with one a line."""

    classes: str | tuple[str, ...] = ()
    """Names of classes that make prompts with `templates`, instead of `prompts`: `cifar10`, `imagenet-1k`, a list, or a
    text or JSON file; each class is drawn equally often."""

    templates: tuple[str, ...] = ()
    """Prompts with a place {} for the class; empty: those of GenQ (arXiv:2312.05272)."""

    labels: tuple[int, ...] = Field(default=())
    """Class labels in turns, for a pipeline that reads them; empty: all of its classes, each equally often."""

    @model_validator(mode="after")
    def _check_one_kind(self) -> ConditionSettings:
        given = [name for name in ("prompts", "classes", "labels") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other: both say what the images are of")
        if self.templates and not self.classes:
            raise ValueError("templates have a place for a class; give classes too, or whole prompts as prompts")
        for template in self.templates:
            require_template(template, places=1)
        return self

    def conditions(self, pipeline: DiffusionPipeline, count: int, rng: Rng) -> Conditions:
        """Return the prompt or label of each of `count` images; none for an unconditional pipeline.

        Raises `InputError` for what the pipeline does not read, or if it lacks prompts; `DataError` if a file of them
        cannot be read.
        """
        given = [name for name in ("prompts", "classes", "labels") if getattr(self, name)]
        reads = {"none": (), "prompts": ("prompts", "classes"), "labels": ("labels",)}[pipeline.conditioning]
        if wrong := [name for name in given if name not in reads]:
            what = "is unconditional: it reads none" if not reads else f"reads {reads[0]}"
            raise InputError(f"{wrong[0]} are given and {pipeline.name} {what}; leave {wrong[0]} out")
        if pipeline.conditioning == "none":
            return None
        if pipeline.conditioning == "labels":
            return self._labels_of(pipeline, count, rng)
        if self.classes:
            plan = self._plan(rng)
            return [plan.prompt(plan.slot(number)).text for number in range(count)]
        prompts = _read(self.prompts) if isinstance(self.prompts, str) else self.prompts
        if not prompts:
            raise InputError(f"{pipeline.name} reads prompts; give prompts=FILE, prompts=[...], or classes")
        return [prompts[number % len(prompts)] for number in range(count)]

    def labels_for(self, pipeline: DiffusionPipeline, count: int, rng: Rng) -> list[int] | None:
        """Return the number of the class that each of `count` images is drawn for; none if they are of no classes.

        Raises as `conditions` does.
        """
        found = self.conditions(pipeline, count, rng)
        if pipeline.conditioning == "labels":
            return [int(label) for label in found or ()]
        if not self.classes:
            return None
        plan = self._plan(rng)
        return [plan.slot(number).labels[0] for number in range(count)]

    def _plan(self, rng: Rng) -> PromptPlan:
        return PromptPlan(class_names(self.classes), rng.child("prompts"), templates=self.templates or TEMPLATES)

    def _labels_of(self, pipeline: DiffusionPipeline, count: int, rng: Rng) -> Sequence[int]:
        if self.labels:
            return [self.labels[number % len(self.labels)] for number in range(count)]
        classes = pipeline.number_of_labels
        if classes is None:
            raise InputError(f"{pipeline.name} does not say how many classes it has; give labels=[...]")
        rounds = -(-count // classes)
        order = [torch.randperm(classes, generator=rng.generator(f"labels of round {turn}")) for turn in range(rounds)]
        return [int(label) for label in torch.cat(order)[:count]]


class SamplerSettings(ConditionSettings):
    """Of which prompts or labels images are, and how a sampler makes them, but for the number of its steps."""

    scheduler: str | None = None
    """Sampler: ddim, ddpm, dpm++, euler, euler_ancestral, lcm, pndm, unipc, or a scheduler of diffusers; none: the
    pipeline's own."""

    guidance: float | None = Field(default=None, ge=0)
    """Classifier-free guidance scale; 1 or less samples without guidance; none: the pipeline's own."""

    negative_prompt: str = ""
    """What guidance leads away from; empty: nothing."""

    eta: float | None = Field(default=None, ge=0, le=1)
    """Share of fresh noise in each step of DDIM; none: the pipeline's own."""

    height: int | None = Field(default=None, ge=8)
    """Height of the images in pixels; none: the pipeline's own."""

    width: int | None = Field(default=None, ge=8)
    """Width of the images in pixels; none: the pipeline's own."""

    def sampled_in(self, steps: int) -> Sampling:
        """Return how images are drawn in so many steps; raises `ValueError` for a height without a width."""
        names = ("guidance", "negative_prompt", "height", "width", "eta")
        return Sampling(steps=steps, **{name: getattr(self, name) for name in names})


def _read(source: str) -> tuple[str, ...]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f'prompts={source} is no file; give a text file with one prompt a line, or a list ["..."]')
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read prompts from {path}: {getattr(error, 'strerror', None) or error}") from error
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise DataError(f"{path} holds no prompt; write one a line")
    return found
