"""The section `evaluate` of a recipe: what networks are measured on, and by which metric of the user's."""

from __future__ import annotations

from pydantic import Field

from synthquant.core.settings import Settings, is_unset
from synthquant.data.codec import MAX_PIXELS, MOST_PIXELS
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images


class EvaluateSection(Settings):
    """What float and quantized network are measured on."""

    data: str = Field(min_length=1)
    """Labelled images: an image set folder, class folders, a Parquet file or folder, or a `datasets` name."""
    batch_size: int = Field(default=128, ge=1)
    """Images per forward pass, fewer where activations are large; does not change the result beyond rounding."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1, le=MOST_PIXELS)
    """Larger images are set aside before they are decoded, as mistakes or attacks on the memory."""
    limit: int | None = Field(default=None, ge=1, exclude_if=is_unset)
    """How many of the images to measure on, evenly spaced over the set; none: all."""
    metric: str | None = Field(default=None, min_length=1, exclude_if=is_unset)
    """`FILE.py:NAME` of a metric of your own: a function of outputs and targets that returns a number or a dictionary
    of numbers, or a class with `update` and `compute`."""
    targets: str | None = Field(default=None, min_length=1, exclude_if=is_unset)
    """Column of the data that holds the targets, such as masks or boxes; none: the labels are."""

    def open(self) -> ImageSet:
        """Return the images; raises as `open_images`."""
        images = open_images(self.data, max_pixels=self.max_pixels)
        if self.limit is None or self.limit >= len(images):
            return images
        return images.subset([index * len(images) // self.limit for index in range(self.limit)])
