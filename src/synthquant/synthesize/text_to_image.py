"""StableQ and GenQ: draw images of the classes with a text-to-image model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, model_validator

from synthquant.core.progress import QUIET, Progress
from synthquant.data.quality import say_what_was_read
from synthquant.data.sources import open_images
from synthquant.data.store import ImageForm
from synthquant.diffusion.embedding import Embedding, read_embedding
from synthquant.diffusion.library import DEFAULT_GENERATOR, Precision
from synthquant.diffusion.pipelines import Sampling
from synthquant.diffusion.text_to_image import TextToImagePipeline, open_text_to_image
from synthquant.methods import SYNTHESIZERS
from synthquant.models.class_labels import Classes, in_classes_of
from synthquant.synthesize.batches import Order, batch_sizes
from synthquant.synthesize.class_names import ClassName, class_names, class_positions, prompt_names
from synthquant.synthesize.drawing import Drawing, collect_drawn, count_redrawn
from synthquant.synthesize.low_pass import LowPass
from synthquant.synthesize.prompt_tuning import PromptTuning, tune_prompt
from synthquant.synthesize.prompts import (
    STYLE_TEMPLATE,
    TEMPLATES,
    ClassOrder,
    PromptPlan,
    Wording,
    require_template,
)

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel

TOKEN_FILE = "token.safetensors"
"""Where the token that `tuning` learns lies, in the folder of the image set."""


class FewShotTuning(PromptTuning):
    """Prompt tuning of GenQ (arXiv:2312.05272) before drawing, on real images."""

    images: str = Field(min_length=1)
    """A few real images with labels: an image set, a folder of class folders, a Parquet file or a `datasets` name."""


@SYNTHESIZERS.register("text_to_image")
class TextToImage(Sampling, LowPass):
    """GenQ (arXiv:2312.05272, first published as StableQ): images drawn by a text-to-image model from class names.

    A class and one of the 27 templates of appendix B make a prompt, at guidance 3.5. The network that is quantized only
    says how many classes there are; it needs no batch norm. With `embedding` or `tuning`, prompts are those of equation
    10, whose token was learned from a few real images.

    The paper does not say sampler, steps, resolution or precision: here they are the pipeline's own with 50 steps.
    Images are stored as drawn and resized where they are read. What the safety checker blanks, black images, images of
    one colour and near-duplicates of the same class are drawn again with the next seed. The filters of the paper
    (energy, batch-norm sensitivity) are methods of their own.
    """

    needs_batch_norm: ClassVar[bool] = False
    form: ClassVar[ImageForm] = ImageForm(dtype="uint8", framing="raw", sized_by_network=False)

    generator: str = Field(default=DEFAULT_GENERATOR, min_length=1)
    """A diffusers text-to-image pipeline: a folder, `zoo/NAME`, or a name on the hub."""

    classes: str | tuple[str, ...] = "model"
    """Names of the classes in the order of the labels: `cifar10`, `imagenet-1k`, `model` (what the network brings), a
    list, or a text or JSON file."""

    guidance: float | None = Field(default=3.5, ge=0)
    """Classifier-free guidance scale; 1 or less draws without guidance, in half the time; none: the pipeline's own."""

    only: tuple[str, ...] = ()
    """Names of the classes to draw; empty: all."""

    order: ClassOrder = "balanced"
    """Whether each class is drawn equally often ("balanced") or the class of each image independently ("uniform")."""

    wording: Wording = "name"
    """What stands for a class: its usual name, any of its names ("any_name"), or the name with a short gloss
    ("gloss"), which tells the crane that flies from the one that lifts."""

    classes_per_prompt: int = Field(default=1, ge=1)
    """Classes that share an image (mixed-class prompts, arXiv:2507.21947); the label is the first one's."""

    templates: tuple[str, ...] = ()
    """Prompts with a place {} for the class, and a second one for the learned token; empty: the paper's."""

    embedding: str | None = Field(default=None, min_length=1)
    """File of a learned token (textual inversion, safetensors)."""

    tuning: FewShotTuning | None = None
    """Learn a token from real images first; it is kept beside the images. Its settings are `images` and those of
    `synthquant tune-prompt`."""

    scheduler: str | None = None
    """Sampler: ddim, ddpm, dpm++, euler, euler_ancestral, lcm, pndm, unipc, or a scheduler of diffusers; none: the
    pipeline's own."""

    batch_size: int = Field(default=8, ge=1)
    """Images drawn together, and images in one part on disk. Changes an image by rounding only."""

    dtype: Precision = "auto"
    """Precision of the generator; "auto": float16 on an accelerator, float32 on a CPU."""

    compiled: bool = False
    """Compile the denoiser; the first batch then takes minutes."""

    safety_checker: bool = True
    """Use the pipeline's safety checker, if it has one. What it finds is blanked and drawn again."""

    redraws: int = Field(default=5, ge=0)
    """How often a bad image is drawn again with the same prompt; then as often with each of two other templates."""

    @model_validator(mode="after")
    def _check_token(self) -> TextToImage:
        if self.embedding is not None and self.tuning is not None:
            raise ValueError("embedding and tuning exclude each other: a token is given or learned")
        for template in self.templates:
            require_template(template, places=1 if self.embedding is None and self.tuning is None else 2)
        return self

    def synthesize(
        self,
        model: FloatModel,
        count: int,
        rng: Rng,
        *,
        writer: ImageSetWriter | None = None,
        progress: Progress = QUIET,
    ) -> ImageSet:
        """Draw exactly `count` images of the generator's size, uint8.

        Each has its label, `prompt`, `template`, `class_names`, `seed`, `rejected` (why earlier seeds were not taken)
        and the `generator`'s fingerprint. Raises `InputError` for classes, prompts or sizes that do not fit, and if the
        generator returns nothing usable; `ModelError` if it cannot be opened; `DataError` if images that are there were
        drawn by another one, or for real images that do not do.
        """
        sizes = batch_sizes(count, self.batch_size)
        if writer is not None and writer.finished_count == count:
            return writer.finish(progress, redrawn=count_redrawn(writer.written()))
        task = self.task(model, rng)
        given = None if self.embedding is None else read_embedding(Path(self.embedding))
        generator = self.open_generator(model.device)
        folder = None if writer is None else writer.folder
        embedding = given if self.tuning is None else self.tune(generator, task, folder, progress)
        drawing = task.drawing(generator, embedding)
        return collect_drawn(drawing, self, Order(model, rng, writer, progress), sizes)

    def task(self, model: FloatModel, rng: Rng) -> DrawingTask:
        """Return what is to be drawn; raises `InputError` for classes and prompts that do not fit."""
        classes = class_names(self.classes, model)
        task = DrawingTask(self, classes, class_positions(self.only, classes, "only"), rng)
        task.plan("<token>" if self.uses_token else None)  # finds what is wrong before the generator is loaded
        return task

    @property
    def uses_token(self) -> bool:
        """Whether prompts hold a learned token."""
        return self.tuning is not None or self.embedding is not None

    def open_generator(self, device: torch.device | str) -> TextToImagePipeline:
        """Open the generator as the settings say; raises as `open_text_to_image`."""
        return open_text_to_image(
            self.generator,
            device=device,
            dtype=self.dtype,
            scheduler=self.scheduler,
            safety_checker=self.safety_checker,
            compiled=self.compiled,
        )

    def tune(
        self, generator: TextToImagePipeline, task: DrawingTask, folder: Path | None, progress: Progress
    ) -> Embedding:
        """Learn the token of `tuning`; it is kept in `folder`. Raises as `tune_prompt`."""
        assert self.tuning is not None
        names = [names[0] for names in prompt_names(task.classes)]
        path = None if folder is None else folder / TOKEN_FILE
        source = self.tuning.images
        real = in_classes_of(open_images(source), Classes("the network", names, len(names)), source, progress)
        rng = task.rng.child("tuning")
        found = tune_prompt(generator, real, names, self.tuning, rng, path=path, progress=progress)
        say_what_was_read(real, progress, source)
        return found


@dataclass(frozen=True)
class DrawingTask:
    """A method's prompts for one network: all that a worker needs to know."""

    method: TextToImage
    """How to draw."""
    classes: tuple[ClassName, ...]
    """The network's classes in the order of its labels."""
    only: tuple[int, ...]
    """Labels that are drawn; empty: all."""
    rng: Rng
    """Source of all draws."""

    def plan(self, token: str | None) -> PromptPlan:
        """Return the prompts; raises `InputError` if they cannot be made."""
        method = self.method
        return PromptPlan(
            self.classes,
            self.rng.child("prompts"),
            templates=method.templates or ((STYLE_TEMPLATE,) if method.uses_token else TEMPLATES),
            token=token,
            only=self.only,
            order=method.order,
            wording=method.wording,
            classes_per_prompt=method.classes_per_prompt,
            redraws=method.redraws,
        )

    def drawing(self, generator: TextToImagePipeline, embedding: Embedding | None) -> Drawing:
        """Return the drawing of these prompts; raises `ModelError` if the token does not fit the generator."""
        token = None
        if embedding is not None:
            token = generator.add_embedding(embedding, self.method.embedding or "the tuned token")
        sampling = Sampling(**{key: getattr(self.method, key) for key in Sampling.model_fields})
        return Drawing(generator, self.plan(token), sampling)
