"""What a network is calibrated and measured with: batches of inputs, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.files import sha256_bytes
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import Preprocess, input_batches
from synthquant.models.float_model import FloatModel
from synthquant.models.signature import Inputs


class Samples(Protocol):
    """A finite number of samples, always the same ones in the same order.

    Samples of a denoiser may also have `steps`: which step of the sampler each was taken at, whole numbers `[N]`.
    Methods then look at all steps alike.
    """

    @property
    def fingerprint(self) -> str:
        """Hash that changes when what the network is given changes."""
        ...

    def __len__(self) -> int:
        """Number of samples, ones that cannot be read included."""
        ...

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Inputs]:
        """Yield inputs of the samples at these positions (all, if none are given) in order, `size` at a time.

        Samples that cannot be read are left out: batches may be smaller, and fewer.
        """
        ...


class SteppedSamples(Samples, Protocol):
    """Samples that a sampler's steps were given: each is of one image at one step."""

    @property
    def steps(self) -> Tensor:
        """The step of each sample, int64 `[rows]`, counted from the sampler's first."""
        ...

    @property
    def images(self) -> Tensor:
        """The image of each sample, int64 `[rows]`; with guidance it has several at a step."""
        ...

    @property
    def timesteps(self) -> Sequence[float]:
        """The time of each step that the sampler made, also of those that no sample is of."""
        ...

    @property
    def is_consecutive(self) -> bool:
        """Whether samples of each image are of steps that follow each other."""
        ...


def is_stepped(samples: Samples) -> TypeGuard[SteppedSamples]:
    """Return whether samples know their steps and images."""
    return all(hasattr(samples, name) for name in ("steps", "images", "timesteps", "is_consecutive"))


class PreparedImages:
    """Images as a network sees them."""

    def __init__(self, images: ImageSet, preprocess: Preprocess) -> None:
        """Take images in pixel space."""
        self._images, self._preprocess = images, preprocess

    @property
    def fingerprint(self) -> str:
        """Hash that changes when the images or their preprocessing change."""
        return sha256_bytes(f"{self._images.fingerprint} {self._preprocess.model_dump_json()}".encode())

    def __len__(self) -> int:
        """Number of images, broken ones included."""
        return len(self._images)

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Inputs]:
        """Yield normalised images, float32 `[B, C, H, W]`."""
        for batch in input_batches(self._images, self._preprocess, size, indices):
            yield Inputs.of(batch.inputs)


class InputSamples:
    """Inputs of a network that takes something else than images, all in memory."""

    def __init__(self, inputs: Inputs) -> None:
        """Take any number of samples."""
        self._inputs = inputs

    @property
    def fingerprint(self) -> str:
        """Hash of names, types, shapes and values."""
        parts = [f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() for name, tensor in self._inputs.named()]
        parts += [
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            for tensor in self._inputs.tensors
        ]
        return sha256_bytes(b"".join(parts))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._inputs)

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Inputs]:
        """Yield the samples at these positions."""
        chosen = torch.tensor(list(range(len(self)) if indices is None else indices), dtype=torch.int64)
        for part in torch.split(chosen, size):
            yield self._inputs.filled([tensor[part] for tensor in self._inputs.tensors])


class _FittingSamples:
    """Samples of which every batch fits the network."""

    def __init__(self, samples: Samples, model: FloatModel) -> None:
        self._samples, self._example = samples, model.example(1)

    @property
    def fingerprint(self) -> str:
        return self._samples.fingerprint

    def __len__(self) -> int:
        return len(self._samples)

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Inputs]:
        for batch in self._samples.batches(size, indices):
            if not isinstance(batch, Inputs):
                raise DataError(f"batches of samples must be synthquant.Inputs; one is a {type(batch).__name__}")
            ordered = self._ordered(batch)
            ordered.require(self._example.signature)
            yield ordered

    def _ordered(self, batch: Inputs) -> Inputs:
        """The batch with its keywords in the order of the example: files sort them, exported networks count them."""
        names = list(self._example.kwargs)
        if set(batch.kwargs) != set(names) or list(batch.kwargs) == names:
            return batch
        return replace(batch, kwargs={name: batch.kwargs[name] for name in names})


def is_samples(source: object) -> TypeGuard[Samples]:
    """Return whether something has all that samples have."""
    return all(hasattr(source, name) for name in ("fingerprint", "batches", "__len__"))


def samples_for(model: FloatModel, source: ImageSet | Samples) -> Samples:
    """Return what a network reads of a source: images are prepared, of other samples each batch is checked.

    Raises:
        UnsupportedModelError: there are images and the network takes none.
        DataError: it is neither; and from `batches` what is no input of the network.
    """
    if isinstance(source, ImageSet):
        return PreparedImages(source, model.preprocess)
    if not is_samples(source):
        raise DataError(
            f"a {type(source).__name__} is no samples; give an image set (synthquant.open_images makes one of what you"
            " have), or what has a length, a fingerprint and batches of synthquant.Inputs (synthquant.Samples)"
        )
    return _FittingSamples(source, model)


def none_readable(source: ImageSet | Samples, count: int, purpose: str) -> DataError:
    """Return the error for `count` images or samples that were to serve a purpose, as `to quantize with`."""
    noun, why = ("images", source.example_set_aside) if isinstance(source, ImageSet) else ("samples", "")
    return DataError(f"none of the {count} {noun} {purpose} can be read{why}")


def spread(count: int, most: int) -> list[int]:
    """Return positions of up to `most` of `count` samples, evenly spaced."""
    wanted = min(count, most)
    return [index * count // wanted for index in range(wanted)]
