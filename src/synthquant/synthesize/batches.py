"""What all synthesis methods share: exact counts, one part per batch, resume, pixel space, who needs batch norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.data.pixels import stored_pixels
from synthquant.data.store import ImageForm, ImageSetWriter
from synthquant.methods import SYNTHESIZERS, Synthesizer
from synthquant.synthesize.low_pass import LowPass, low_passed

if TYPE_CHECKING:
    from synthquant.core.progress import Bar
    from synthquant.core.rng import Rng
    from synthquant.models.float_model import FloatModel


def batch_sizes(count: int, batch_size: int) -> list[int]:
    """Sizes that add up to `count`; only the last may be smaller. Raises `InputError` if `count` is not positive."""
    if count < 1:
        raise InputError(f"count is {count}; ask for at least 1 image")
    full, rest = divmod(count, batch_size)
    return [batch_size] * full + ([rest] if rest else [])


@dataclass(frozen=True)
class Batch:
    """One batch that is to be made."""

    index: int
    """Its number."""
    size: int
    """How many images it has."""
    rng: Rng
    """Its own source of randomness."""
    bar: Bar
    """Advanced by the method: by one for each iteration, or by the images of a method without iterations."""


@dataclass(frozen=True)
class Order:
    """What `synthesize` is asked for, beside how many images."""

    model: FloatModel
    rng: Rng
    writer: ImageSetWriter | None
    progress: Progress


@dataclass(frozen=True)
class Made:
    """One batch that was made."""

    pixels: Tensor
    """Images in pixel space, `[n, C, H, W]`, uint8 or floats."""
    labels: Tensor | None = None
    """Their classes, int64 `[n]`."""
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    """What else is known of each."""


def collect(
    method: LowPass,
    order: Order,
    sizes: Sequence[int],
    make: Callable[[Sequence[int], Bar], Iterable[Made]],
    title: str,
    steps: Sequence[int],
) -> list[Made]:
    """Make every batch that is not on disk yet; with a writer each is one part, without one they are returned.

    This is where images become what is stored: filtered if the method's `low_pass` says so, in its pixel type.

    Args:
        method: whose images they are.
        order: for which network, and where images and progress go.
        sizes: of all batches, those on disk too.
        make: gives the batches of these numbers one after the other, in order, and advances the bar.
        title: of the progress bar.
        steps: how far each batch advances it.
    """
    writer, kept = order.writer, []
    missing = list(range(len(sizes))) if writer is None else writer.missing_parts(len(sizes))
    with order.progress.bar(title, sum(steps)) as bar:
        bar.advance(sum(steps) - sum(steps[index] for index in missing))  # what an earlier run left on disk is done
        for made in make(missing, bar):
            pixels = stored_pixels(low_passed(made.pixels, method.low_pass), image_form(method).dtype)
            batch = replace(made, pixels=pixels.contiguous(memory_format=torch.contiguous_format))
            if writer is None:
                kept.append(batch)
            else:
                writer.append(batch.pixels, batch.labels, batch.columns)
    return kept


def in_memory(name: str, method: Settings, order: Order, batches: Sequence[Made]) -> ImageSet:
    """Return the image set of a method registered as `name`, from all its batches."""
    form, labels = image_form(method), [batch.labels for batch in batches if batch.labels is not None]
    return ImageSet.from_tensors(
        torch.cat([batch.pixels for batch in batches]),
        torch.cat(labels) if labels else None,
        dtype=form.dtype,
        columns={name: [value for batch in batches for value in batch.columns[name]] for name in batches[0].columns},
        framing=form.framing,
        method=name,
        settings=method.model_dump(mode="json"),
        seed=order.rng.seed,
        model_fingerprint=order.model.fingerprint,
    )


def make_batches(
    method: str,
    settings: LowPass,
    order: Order,
    sizes: list[int],
    make_batch: Callable[[Batch], Tensor | tuple[Tensor, Tensor]],
    *,
    iterations: int | None = None,
    measured: Mapping[str, Any] | None = None,
) -> ImageSet:
    """Make every batch that is not on disk yet from normalised images, and return the image set.

    Batch `b` draws from `rng.child(f"batch-{b}")` only, or its images from `rng.child(f"image-{i}")` with their numbers
    in the set, so that parts can be made again. With a writer each batch is one part.

    Args:
        method: registered name of the method.
        settings: the method.
        order: for which network, and where images and progress go.
        sizes: of all batches, those on disk too.
        make_batch: gives normalised images `[n, C, H, W]`, or these and their classes, int64 `[n]`.
        iterations: of a batch, which the progress bar counts; none: it counts images.
        measured: what was measured of the network to make them, for the manifest.
    """
    steps = sizes if iterations is None else [iterations] * len(sizes)
    title = method if iterations is None else f"{method}, {len(sizes)} x {iterations} iterations"

    def make(missing: Sequence[int], bar: Bar) -> Iterator[Made]:
        for index in missing:
            made = make_batch(Batch(index, sizes[index], order.rng.child(f"batch-{index}"), bar))
            normalized, labels = (made, None) if isinstance(made, Tensor) else made
            yield Made(order.model.preprocess.pixels(normalized.float()), labels)

    kept = collect(settings, order, sizes, make, title, steps)
    if order.writer is not None:
        return order.writer.finish(order.progress, measured=measured)
    images = in_memory(method, settings, order, kept)
    images.manifest = images.manifest.model_copy(update={"measured": dict(measured or {})})
    return images


def open_writer(
    folder: Path,
    name: str,
    method: Synthesizer,
    count: int,
    seed: int,
    model: FloatModel,
    progress: Progress = QUIET,
) -> ImageSetWriter:
    """Return the writer of a new or unfinished image set of `count` images of the method registered as `name`.

    Raises what `ImageSetWriter` raises.
    """
    form = image_form(method)
    return ImageSetWriter(
        folder,
        method=name,
        settings=cast(Settings, method).model_dump(mode="json"),
        seed=seed,
        model_fingerprint=model.fingerprint,
        image_size=model.preprocess.input_size if form.sized_by_network else None,
        target_count=count,
        dtype=form.dtype,
        framing=form.framing,
        progress=progress,
    )


def image_form(method: Synthesizer | Settings) -> ImageForm:
    """Return in which form a method makes its images."""
    form: ImageForm = getattr(method, "form", ImageForm())
    return form


def makes_images(method: Synthesizer | type[Synthesizer]) -> bool:
    """Return whether a method makes images, and not something else that networks are quantized with."""
    return bool(getattr(method, "makes_images", True))


def lacking(method: str, model: FloatModel, lacks: str, need: str) -> UnsupportedModelError:
    """Return the error for a network without what a method needs; it names the methods that do not need it.

    Args:
        method: registered name of the method.
        model: the network.
        lacks: what it lacks, as "no ...".
        need: the class variable by which a method says that it needs that.
    """
    others = [name for name, other in SYNTHESIZERS.items() if makes_images(other) and not getattr(other, need, False)]
    return UnsupportedModelError(
        f"{model.name} has {lacks}, which {method} needs;"
        f" use a method that does not: {', '.join(sorted(others)) or '(none is registered)'}"
    )


def number_of_classes(model: FloatModel) -> int:
    """Classes of a network, for a method's `cross_entropy`; raises `UnsupportedModelError` if it is no classifier."""
    if model.task != "classify":
        raise UnsupportedModelError(
            f"{model.name} is no classifier (its task is {model.task!r}), and the method draws classes for its images;"
            " leave them out with --set cross_entropy=0"
        )
    with torch.no_grad():
        return model.logits(model.example_images(1)).shape[1]
