"""Features of a set of images, by the network that is named: a classifier, or Inception as torchmetrics has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches
from synthquant.evaluate.diversity import features_and_logits
from synthquant.evaluate.torch_metrics import INCEPTION, open_inception
from synthquant.models.class_labels import classes_of, in_classes_of
from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.open import open_model
from synthquant.models.samples import none_readable

_SEEN_SMALLER = 2  # times as large as what the network sees: then it hardly sees the images


@dataclass(frozen=True)
class ImageFeatures:
    """What a network makes of the images of a set that can be read."""

    vectors: Tensor
    """float32 `[N, D]`."""
    indices: Tensor
    """int64 `[N]`: which image of the set each row is of."""
    classes: Tensor | None
    """int64 `[N]`: the class with the highest logit; none where the network is no classifier."""
    labels: Tensor | None
    """int64 `[N]`: the set's labels as classes of the network, -1 where an image has none; none where it has none."""

    def rows_of(self, images: Tensor) -> Tensor:
        """Return the row of each of these images of the set, int64; -1 for one that could not be read."""
        table = torch.full((int(max(images.max(), self.indices.max())) + 1,), -1)
        table[self.indices] = torch.arange(len(self.indices))
        return table[images]


class FeatureExtractor(Protocol):
    """A network whose features images are compared by."""

    name: str
    """What stands in results: the network and which of its features."""

    def features(self, images: ImageSet, source: str, *, batch_size: int, progress: Progress = QUIET) -> ImageFeatures:
        """Return the features of all images that can be read; raises `DataError` if none can."""
        ...


class ClassifierFeatures:
    """What the last layer with weights of a classifier reads, averaged over positions."""

    def __init__(self, model: FloatModel) -> None:
        """Take a classifier; raises `UnsupportedModelError` for another network."""
        model.require_logits()
        self._model = model
        width = features_and_logits(model, model.example_images(2))[0].shape[1]
        self.name = f"{model.source.source}, input of the last layer with weights ({width} numbers)"

    def features(self, images: ImageSet, source: str, *, batch_size: int, progress: Progress = QUIET) -> ImageFeatures:
        """Return the features of all images that can be read, each prepared as the network wants it.

        Warns where images are far larger than what the network sees. Raises `DataError` if none can be read.
        """
        model, size = self._model, images.manifest.image_size
        seen = model.preprocess.input_size
        if size is not None and min(size) > _SEEN_SMALLER * max(seen):
            progress.warn(
                f"{source}: images of {size[0]}x{size[1]} are seen at {seen[0]}x{seen[1]} by {model.name}; a network"
                f" of their size, or --features {INCEPTION}, sees more of them"
            )
        labelled = in_classes_of(images, classes_of(model), source, progress)
        found, tops, indices = [], [], []
        with progress.bar(f"features of {source}", len(images)) as bar:
            for batch in input_batches(labelled, model.preprocess, model.samples_at_once(batch_size)):
                vectors, logits = features_and_logits(model, batch.inputs.to(model.device))
                found.append(vectors.float().cpu())
                tops.append(logits.argmax(1).cpu())
                indices.extend(batch.indices)
                bar.advance(len(batch.indices))
        if not found:
            raise none_readable(images, len(images), f"in {source}")
        labels = None if labelled.labels is None else labelled.labels[indices]
        return ImageFeatures(torch.cat(found), torch.tensor(indices), torch.cat(tops), labels)


class InceptionFeatures:
    """The 2,048 features of the original FID, as torchmetrics computes them."""

    name = f"{INCEPTION} (torchmetrics' Inception-v3 with the weights of the original FID, 2048 numbers)"

    def __init__(self, network: nn.Module, device: torch.device | str) -> None:
        """Take what `open_inception` gives."""
        self._network, self._device = network, device

    @torch.no_grad()
    def features(self, images: ImageSet, source: str, *, batch_size: int, progress: Progress = QUIET) -> ImageFeatures:
        """Return the features of all images that can be read; the network scales them itself.

        Raises `DataError` if none can be read, `UnsupportedModelError` unless they have one or three channels.
        """
        found, indices = [], []
        with progress.bar(f"features of {source}", len(images)) as bar:
            for batch in images.batches(batch_size):
                for group in _of_one_size(batch.images):
                    found.append(self._network(group.to(self._device)).float().cpu())
                indices.extend(_in_order_of_size(batch.images, batch.indices))
                bar.advance(len(batch.indices))
        if not found:
            raise none_readable(images, len(images), f"in {source}")
        order = torch.tensor(indices).argsort()
        return ImageFeatures(torch.cat(found)[order], torch.tensor(indices)[order], None, None)


def open_features(name: str, device: torch.device | str, progress: Progress = QUIET) -> FeatureExtractor:
    """Return what computes the features of that name: `inception`, or any classifier as `open_model` takes it.

    Raises:
        ModelError: there is no such network, it is no classifier, or Inception's weights are not on this machine.
        MissingExtraError: a package that it needs is not installed.
    """
    if name == INCEPTION:
        return InceptionFeatures(open_inception(device), device)
    return ClassifierFeatures(open_model(ModelSource(source=name), device=device, progress=progress))


def _of_one_size(images: list[Tensor]) -> Iterator[Tensor]:
    """The images as uint8 `[B, 3, H, W]`, one tensor for each size."""
    for shape in dict.fromkeys(image.shape for image in images):
        if shape[0] not in (1, 3):
            raise UnsupportedModelError(f"images of {shape[0]} channels are no pictures, which {INCEPTION} looks at")
        group = torch.stack([image for image in images if image.shape == shape])
        if group.dtype != torch.uint8:
            group = group.float().nan_to_num(0).clamp(0, 1).mul(255).round().to(torch.uint8)
        yield group.expand(-1, 3, -1, -1)


def _in_order_of_size(images: list[Tensor], indices: list[int]) -> list[int]:
    shapes = list(dict.fromkeys(image.shape for image in images))
    return [index for shape in shapes for image, index in zip(images, indices, strict=True) if image.shape == shape]
