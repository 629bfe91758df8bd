"""How a network wants its images: size, crop, mean, standard deviation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from synthquant.core.errors import DataError
from synthquant.core.settings import Settings
from synthquant.data.codec import MAX_PIXELS
from synthquant.data.image_set import ImageSet
from synthquant.data.manifest import Framing

Side = Annotated[int, Field(ge=1, le=16384)]
"""Pixels of a side of what a network sees."""
ChannelMean = Annotated[float, Field(ge=-1e4, le=1e4)]
"""Pixels are in 0..1; networks that want 0..255 have means up to 255."""
ChannelStd = Annotated[float, Field(ge=1e-4, le=1e4)]
"""As `ChannelMean`; what is beyond leaves nothing of an image in float32, or makes it infinite."""
Interpolation = Literal["bilinear", "bicubic", "nearest", "lanczos"]

# Of red, green and blue; what Pillow makes grey with.
_BRIGHTNESS = (0.299, 0.587, 0.114)

_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
}


class Preprocess(Settings):
    """Turns pixel-space images into network input, as torchvision and timm do for evaluation.

    A `raw` image is resized (short side, or to an exact size) and cropped in the centre; a `cropped` one is only
    resized to `input_size` if it has another size. Then `(pixels - mean) / std`.
    """

    input_size: tuple[Side, Side]
    """Height and width the network sees."""
    resize: Side | tuple[Side, Side] | None = None
    """Short side, or exact height and width, that a raw image is resized to before the crop; none: no resize."""
    mean: Annotated[tuple[ChannelMean, ...], Field(min_length=1)]
    """Mean of each channel, in pixel space; as many as the network takes channels."""
    std: Annotated[tuple[ChannelStd, ...], Field(min_length=1)]
    """Standard deviation of each channel, in pixel space."""
    interpolation: Interpolation = "bilinear"
    """Resampling filter, with antialiasing as in Pillow."""
    crop: bool = Field(default=True)
    """Crop a raw image in the centre (padding a smaller one with black); without it, resize to `input_size`."""

    @model_validator(mode="after")
    def _check_channels(self) -> Preprocess:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one for each channel")
        return self

    @property
    def channels(self) -> int:
        """How many channels the network sees."""
        return len(self.mean)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return network input of pixel-space values `[B,C,H,W]` (or `[C,H,W]`); differentiable."""
        mean, std = _channel_constants(self.mean, self.std, pixels.dtype, pixels.device)
        return (pixels - mean) / std

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest value that a pixel in 0..1 can have as network input, over all channels."""
        pairs = list(zip(self.mean, self.std, strict=True))
        return min(-mean / std for mean, std in pairs), max((1 - mean) / std for mean, std in pairs)

    def pixels(self, normalized: Tensor) -> Tensor:
        """Return pixel-space values of network input `[B,C,H,W]` (or `[C,H,W]`); inverse of `normalize`."""
        mean, std = _channel_constants(self.mean, self.std, normalized.dtype, normalized.device)
        return normalized * std + mean

    def cut_off(self, normalized: Tensor) -> Tensor:
        """Return network input `[B,C,H,W]` with what is darker than black and brighter than white cut off."""
        ends = torch.stack([torch.full((self.channels, 1, 1), end) for end in (0.0, 1.0)]).to(normalized)
        black, white = self.normalize(ends)
        return torch.clamp(normalized, black, white)

    def fit(self, image: Tensor, framing: Framing) -> Tensor:
        """Return one image `[c,h,w]` as the network sees it, `[C,H,W]`, same pixel type; no normalisation.

        Of colours a network of one channel sees the brightness (ITU-R BT.601), and grey is the same in all three.
        Raises `DataError` if an image has another number of channels, or is so long and narrow that resizing its short
        side would make a giant of it.
        """
        image = _in_channels(image, self.channels)
        if framing == "cropped":
            return _resized(image, self.input_size, self.interpolation)
        if isinstance(self.resize, int):
            size = _short_side_size(image, self.resize)
            if size[0] * size[1] > max(MAX_PIXELS, image[0].numel()):
                sides = f"{image.shape[-1]}x{image.shape[-2]}"
                raise DataError(f"too long and narrow: {sides} would be resized to {size[1]}x{size[0]}")
            image = _resized(image, size, self.interpolation)
        elif self.resize is not None:
            image = _resized(image, self.resize, self.interpolation)
        if self.crop:
            return _center_crop(image, self.input_size)
        return _resized(image, self.input_size, self.interpolation)

    def __call__(self, images: Sequence[Tensor] | Tensor, framing: Framing) -> Tensor:
        """Return network input, float32 `[B,C,H,W]`, of images `[c,h,w]` (uint8, or floats in pixel space)."""
        if len(images) == 0:
            return torch.zeros(0, self.channels, *self.input_size)
        batch = torch.stack([self.fit(image, framing) for image in images])
        pixels = batch.float().div_(255) if batch.dtype == torch.uint8 else batch.float()
        return self.normalize(pixels)


@dataclass(frozen=True)
class InputBatch:
    """Images as a network sees them."""

    inputs: Tensor
    """float32 `[B,C,H,W]`, normalised."""
    labels: Tensor | None
    """int64 `[B]`, -1 where an image has no label."""
    indices: list[int]
    """Positions in the image set."""


def input_batches(
    image_set: ImageSet, preprocess: Preprocess, batch_size: int = 64, indices: Sequence[int] | None = None
) -> Iterator[InputBatch]:
    """Yield network input of a set in batches; decoding and resizing run ahead in threads.

    Broken images are left out and noted in `image_set.set_aside`.
    """
    fit = partial(preprocess.fit, framing=image_set.manifest.framing)
    for batch in image_set.batches(batch_size, indices, transform=fit):
        yield InputBatch(preprocess(batch.images, "cropped"), batch.labels, batch.indices)


def model_inputs(
    image_set: ImageSet, preprocess: Preprocess, indices: Sequence[int] | None = None, batch_size: int = 64
) -> Tensor:
    """Return network input of a whole set, float32 `[N,C,H,W]`, in one tensor; for sets that fit into memory.

    Broken images are left out and noted in `image_set.set_aside`. Raises `DataError` if no image is left.
    """
    batches = [batch.inputs for batch in input_batches(image_set, preprocess, batch_size, indices)]
    if not batches:
        raise DataError(f"no usable image among {len(image_set) if indices is None else len(indices)}")
    return torch.cat(batches)


@lru_cache(maxsize=64)  # making them anew each step would copy to the GPU, which waits for it
def _channel_constants(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # a cached inference tensor could never take part in a backward pass
        return (
            torch.tensor(mean, dtype=dtype, device=device).view(-1, 1, 1),
            torch.tensor(std, dtype=dtype, device=device).view(-1, 1, 1),
        )


def _short_side_size(image: Tensor, size: int) -> tuple[int, int]:
    # The long side is cut to a whole number, not rounded, as in torchvision.
    height, width = image.shape[-2:]
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def _resized(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if tuple(image.shape[-2:]) == size:
        return image
    height_width, filter_ = (size[1], size[0]), _FILTERS[interpolation]
    if image.dtype == torch.uint8 and len(image) == 3:
        picture = Image.fromarray(np.ascontiguousarray(image.numpy().transpose(1, 2, 0)))
        array = np.asarray(picture.resize(height_width, filter_))
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
    # Pillow resizes floats, and whole numbers of other than three channels, one channel at a time, by the same filters.
    values = image if image.dtype == torch.uint8 else image.float()
    channels = [Image.fromarray(channel).resize(height_width, filter_) for channel in values.contiguous().numpy()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).to(image.dtype)


def _in_channels(image: Tensor, channels: int) -> Tensor:
    """Colours as grey or grey as colours, where a network asks for it."""
    if len(image) == channels:
        return image
    if len(image) == 1 and channels == 3:
        return image.expand(3, -1, -1)
    if len(image) == 3 and channels == 1:
        if image.dtype != torch.uint8:
            return (image.float() * torch.tensor(_BRIGHTNESS).view(3, 1, 1)).sum(0, keepdim=True).to(image.dtype)
        picture = Image.fromarray(np.ascontiguousarray(image.numpy().transpose(1, 2, 0)))
        return torch.from_numpy(np.array(picture.convert("L")))[None]
    raise DataError(f"it has {len(image)} channels, and the network takes {channels}")


def _center_crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    # The rounding of odd margins is torchvision's.
    missing_height, missing_width = (max(0, want - have) for want, have in zip(size, image.shape[-2:], strict=True))
    if missing_height or missing_width:
        left, top = missing_width // 2, missing_height // 2
        image = functional.pad(image, (left, missing_width - left, top, missing_height - top))
    top = round((image.shape[-2] - size[0]) / 2)
    left = round((image.shape[-1] - size[1]) / 2)
    return image[..., top : top + size[0], left : left + size[1]]
