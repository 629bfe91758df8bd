"""StableQ and GenQ: draw images of the classes with a text-to-image model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, model_validator

from synthquant.core.errors import DataError
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.data.store import ImageForm
from synthquant.diffusion.pipelines import DEFAULT_GENERATOR, Precision, Sampling, open_text_to_image
from synthquant.methods import SYNTHESIZERS
from synthquant.synthesize.batches import batch_sizes
from synthquant.synthesize.class_names import ClassName, class_names, class_positions, prompt_names
from synthquant.synthesize.drawing import Batch, Drawing, settle
from synthquant.synthesize.flaws import SeenImages, thumbnails
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
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel

TOKEN_FILE = "token.safetensors"
"""Where the token that `tuning` learns lies, in the folder of the image set."""


class FewShotTuning(PromptTuning):
    """Prompt tuning of GenQ (arXiv:2312.05272) before drawing, on real images."""

    images: str
    """A few real images with labels: an image set, a folder of class folders, a Parquet file or a `datasets` name."""


@SYNTHESIZERS.register("text_to_image")
class TextToImage(Sampling):
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

    generator: str = DEFAULT_GENERATOR
    """A diffusers text-to-image pipeline: a folder, `zoo/NAME`, or a name on the hub."""

    classes: str | tuple[str, ...] = "model"
    """Names of the classes in the order of the labels: `cifar10`, `imagenet-1k`, `model` (what the network brings), a
    list, or a text or JSON file."""

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

    embedding: str | None = None
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
            return writer.finish(progress, redrawn=_redrawn(writer.written()))
        classes = class_names(self.classes, model)
        only = class_positions(self.only, classes, "only")
        drawing = self.prepare(model.device, classes, only, rng, None if writer is None else writer.folder, progress)
        seen = SeenImages()
        batches: list[Batch] = []
        if writer is not None:
            _take_up(writer, drawing.generator.fingerprint, seen)
        done = 0 if writer is None else writer.finished_parts
        with progress.bar("text_to_image", count) as bar:
            bar.advance(sum(sizes[:done]))
            for index in range(done, len(sizes)):
                first = sum(sizes[:index])
                batch = settle(drawing.draw(range(first, first + sizes[index])), drawing, seen)
                bar.advance(sizes[index])
                if writer is None:
                    batches.append(batch)
                else:
                    writer.append(batch.pixels, batch.labels, batch.columns(drawing.generator.fingerprint))
        if drawing.cut:
            progress.warn(f"{len(drawing.cut)} prompts are longer than the text encoder reads: {drawing.cut[0]!r}")
        images = _in_memory(self, batches, drawing, rng, model) if writer is None else None
        redrawn = _redrawn(images if writer is None else writer.written())
        if redrawn:
            listed = ", ".join(f"{number} {reason}" for reason, number in redrawn.items())
            progress.warn(f"{sum(redrawn.values())} images were drawn again: {listed}")
        if writer is not None:
            return writer.finish(progress, redrawn=redrawn)
        assert images is not None
        return images

    def prepare(
        self,
        device: torch.device,
        classes: Sequence[ClassName],
        only: Sequence[int],
        rng: Rng,
        folder: Path | None,
        progress: Progress,
    ) -> Drawing:
        """Open the generator, learn or load its token, and plan the prompts."""
        tuned = self.tuning is not None or self.embedding is not None
        templates = self.templates or ((STYLE_TEMPLATE,) if tuned else TEMPLATES)

        def plan(token: str | None) -> PromptPlan:
            return PromptPlan(
                classes,
                rng.child("prompts"),
                templates=templates,
                token=token,
                only=only,
                order=self.order,
                wording=self.wording,
                classes_per_prompt=self.classes_per_prompt,
                redraws=self.redraws,
            )

        plan("<token>" if tuned else None)  # finds what is wrong before the generator is loaded
        generator = open_text_to_image(
            self.generator,
            device=device,
            dtype=self.dtype,
            scheduler=self.scheduler,
            safety_checker=self.safety_checker,
            compiled=self.compiled,
        )
        token = None
        if self.embedding is not None:
            token = generator.load_embedding(Path(self.embedding))
        elif self.tuning is not None:
            names = [names[0] for names in prompt_names(classes)]
            path = None if folder is None else folder / TOKEN_FILE
            source = rng.child("tuning")
            real = open_images(self.tuning.images)
            embedding = tune_prompt(generator, real, names, self.tuning, source, path=path, progress=progress)
            token = generator.add_embedding(embedding, "the tuned token")
        return Drawing(generator, plan(token), Sampling(**{key: getattr(self, key) for key in Sampling.model_fields}))


def _take_up(writer: ImageSetWriter, generator: str, seen: SeenImages) -> None:
    """Remember the images of finished parts; raises `DataError` if another generator drew them."""
    images = writer.written()
    if images is None:
        return
    if images.column("generator")[0] != generator:
        raise DataError(
            f"{writer.folder} holds images of another generator or token; choose another folder or remove it"
        )
    for batch in images.batches(256):
        assert batch.labels is not None
        for label, image in zip(batch.labels.tolist(), batch.images, strict=True):
            seen.add(label, thumbnails(image[None])[0])


def _redrawn(images: ImageSet | None) -> dict[str, int]:
    """How many images were drawn and not taken, by reason."""
    texts = [] if images is None else images.column("rejected")
    return dict(sorted(Counter(reason for text in texts for reason in text.split(", ") if reason).items()))


def _in_memory(
    method: TextToImage, batches: Sequence[Batch], drawing: Drawing, rng: Rng, model: FloatModel
) -> ImageSet:
    columns = [batch.columns(drawing.generator.fingerprint) for batch in batches]
    images = ImageSet.from_tensors(
        torch.cat([batch.pixels for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        dtype=method.form.dtype,
        columns={name: [value for part in columns for value in part[name]] for name in columns[0]},
        framing=method.form.framing,
        method="text_to_image",
        settings=method.model_dump(mode="json"),
        seed=rng.seed,
        model_fingerprint=model.fingerprint,
    )
    images.manifest = images.manifest.model_copy(update={"redrawn": _redrawn(images)})
    return images
