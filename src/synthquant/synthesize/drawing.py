"""Drawing batches of a prompt plan: bad images are found and drawn again with the next seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from synthquant.core.errors import DataError, InputError
from synthquant.data.image_set import ImageSet
from synthquant.diffusion.pipelines import Drawn, Sampling
from synthquant.diffusion.text_to_image import TextToImagePipeline
from synthquant.synthesize.batches import Made, Order, collect, in_memory
from synthquant.synthesize.flaws import SeenImages, black, constant, thumbnails
from synthquant.synthesize.low_pass import LowPass, low_passed
from synthquant.synthesize.prompts import Prompt, PromptPlan, Slot

if TYPE_CHECKING:
    from synthquant.core.progress import Bar
    from synthquant.data.store import ImageSetWriter

_NAME = "text_to_image"


@dataclass
class Batch:
    """Some images of a set, while they are being drawn and afterwards."""

    slots: list[Slot]
    """Places of the set."""
    prompts: list[Prompt]
    """The attempt at each that counts."""
    images: list[Tensor]
    """What it gave, uint8 `[3, H, W]`."""
    rejected: list[list[str]]
    """Why each attempt before it was not taken."""

    @property
    def pixels(self) -> Tensor:
        """All images, uint8 `[B, 3, H, W]`."""
        return torch.stack(self.images)

    @property
    def labels(self) -> Tensor:
        """The first class of each, int64 `[B]`."""
        return torch.tensor([slot.labels[0] for slot in self.slots])

    def columns(self, generator: str) -> dict[str, list[Any]]:
        """What is stored beside the images; `generator` is the generator's fingerprint."""
        return {
            "prompt": [prompt.text for prompt in self.prompts],
            "template": [prompt.template for prompt in self.prompts],
            "class_names": [prompt.class_names for prompt in self.prompts],
            "seed": [prompt.seed for prompt in self.prompts],
            "rejected": [", ".join(reasons) for reasons in self.rejected],
            "generator": [generator] * len(self.prompts),
        }


class BatchSource(Protocol):
    """Draws batches: a generator in this process, or several elsewhere."""

    cut: list[str]
    """Prompts whose end the text encoder does not see."""

    @property
    def fingerprint(self) -> str:
        """The generator's, its token included."""
        ...

    def batches(self, places: Sequence[range]) -> Iterator[Batch]:
        """Draw the images at these places of the set, a batch for each range, in order."""
        ...

    def redraw(self, batch: Batch, places: Sequence[int]) -> None:
        """Draw these images of a batch with their next seed."""
        ...


@dataclass
class Drawing:
    """A generator and what it is to draw."""

    generator: TextToImagePipeline
    plan: PromptPlan
    sampling: Sampling
    cut: list[str] = field(default_factory=list)
    """Prompts whose end the text encoder does not see."""
    usable: int = 0
    """Images without a flaw so far."""

    @property
    def fingerprint(self) -> str:
        """The generator's, its token included."""
        return self.generator.fingerprint

    def batches(self, places: Sequence[range]) -> Iterator[Batch]:
        """Draw the images at these places, one batch after another."""
        return map(self.draw, places)

    def draw(self, numbers: Iterable[int]) -> Batch:
        """Draw the images at these places of the set, each with the first seed that gives one without a flaw.

        Near-duplicates are not looked for: `settle` does that. Raises `InputError` if a place gets no usable image.
        """
        slots = [self.plan.slot(number) for number in numbers]
        empty = torch.empty(0, dtype=torch.uint8)
        batch = Batch(slots, [self.plan.prompt(slot) for slot in slots], [empty] * len(slots), [[] for _ in slots])
        self.redraw(batch, range(len(slots)))
        return batch

    def redraw(self, batch: Batch, places: Sequence[int]) -> None:
        """Draw these images of a batch with the next seed, until none has a flaw. Raises as `draw` does."""
        waiting = list(places)
        while waiting:
            for place in waiting:
                self._require_attempt_left(batch, place)
                batch.prompts[place] = self.plan.prompt(batch.slots[place], len(batch.rejected[place]))
            prompts = [batch.prompts[place] for place in waiting]
            self._note_cut(prompts)
            seeds = [prompt.seed for prompt in prompts]
            drawn = self.generator.draw([prompt.text for prompt in prompts], seeds, self.sampling)
            bad = []
            for place, image, flaw in zip(waiting, drawn.images, find_flaws(drawn), strict=True):
                if flaw is None:
                    batch.images[place] = image
                    self.usable += 1
                else:
                    batch.rejected[place].append(flaw)
                    bad.append(place)
            waiting = bad

    def _require_attempt_left(self, batch: Batch, place: int) -> None:
        reasons = batch.rejected[place]
        # A generator that has made nothing but blanks is broken; other templates will not mend it.
        limit = self.plan.attempts if self.usable else self.plan.attempts_with_a_template
        if len(reasons) < limit:
            return
        listed = ", ".join(f"{number} {reason}" for reason, number in Counter(reasons).items())
        advice = (
            "leave the class out with only=[...] or raise redraws"
            if self.usable
            else "try the generator alone: its dtype (autoencoders can overflow in float16), scheduler and steps"
        )
        raise InputError(
            f"{self.generator.name} gives no usable image for {batch.prompts[place].text!r}: {len(reasons)} attempts,"
            f" {listed}; {advice}"
        )

    def _note_cut(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.text not in self.cut and self.generator.is_cut(prompt.text):
                self.cut.append(prompt.text)


def settle(batch: Batch, source: BatchSource, seen: SeenImages, low_pass: float | None = None) -> Batch:
    """Draw again what is nearly the same as an earlier image of its class, until nothing is; remember the rest.

    Images are compared as they are stored, behind the filter `low_pass`. Raises `InputError` if the generator repeats
    itself whatever the seed.
    """
    waiting = list(range(len(batch.slots)))
    while waiting:
        repeated = []
        for place in waiting:
            label, stored = batch.slots[place].labels[0], low_passed(batch.images[place][None], low_pass)
            thumbnail = thumbnails(stored)[0]
            if seen.holds(label, thumbnail):
                batch.rejected[place].append("duplicate")
                repeated.append(place)
            else:
                seen.add(label, thumbnail)
        if repeated:
            source.redraw(batch, repeated)
        waiting = repeated
    return batch


def find_flaws(drawn: Drawn) -> list[str | None]:
    """What is wrong with each image: "unsafe", "not finite", "black", "constant", or none."""
    found: list[str | None] = []
    for place, (dark, plain) in enumerate(zip(black(drawn.images), constant(drawn.images), strict=True)):
        flaws = {
            "unsafe": drawn.unsafe[place],
            "not finite": not drawn.finite[place],
            "black": bool(dark),
            "constant": bool(plain),
        }
        found.append(next((name for name, is_so in flaws.items() if is_so), None))
    return found


def collect_drawn(source: BatchSource, method: LowPass, order: Order, sizes: Sequence[int]) -> ImageSet:
    """Draw every batch that is not on disk yet, and return the image set.

    Raises `DataError` if the parts on disk are of another generator, `InputError` as `Drawing.draw` does.
    """
    seen, writer, progress = SeenImages(), order.writer, order.progress
    if writer is not None:
        _take_up(writer, source.fingerprint, seen)
    places = [range(end - size, end) for end, size in zip(accumulate(sizes), sizes, strict=True)]

    def draw(missing: Sequence[int], bar: Bar) -> Iterator[Made]:
        for drawn in source.batches([places[index] for index in missing]):
            batch = settle(drawn, source, seen, method.low_pass)
            yield Made(batch.pixels, batch.labels, batch.columns(source.fingerprint))
            bar.advance(len(batch.slots))

    batches = collect(method, order, sizes, draw, _NAME, sizes)
    if source.cut:
        progress.warn(f"{len(source.cut)} prompts are longer than the text encoder reads: {source.cut[0]!r}")
    images = in_memory(_NAME, method, order, batches) if writer is None else writer.written()
    redrawn = count_redrawn(images)
    if redrawn:
        listed = ", ".join(f"{number} {reason}" for reason, number in redrawn.items())
        progress.warn(f"{sum(redrawn.values())} images were drawn again: {listed}")
    if writer is not None:
        return writer.finish(progress, redrawn=redrawn)
    assert images is not None
    images.manifest = images.manifest.model_copy(update={"redrawn": redrawn})
    return images


def count_redrawn(images: ImageSet | None) -> dict[str, int]:
    """How many images were drawn and not taken, by reason."""
    texts = [] if images is None else images.column("rejected")
    return dict(sorted(Counter(reason for text in texts for reason in text.split(", ") if reason).items()))


def _take_up(writer: ImageSetWriter, generator: str, seen: SeenImages) -> None:
    """Remember the images of finished parts."""
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
