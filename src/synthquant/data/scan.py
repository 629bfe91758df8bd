"""Statistics and defects of images, gathered one image after another."""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.settings import Settings
from synthquant.data.manifest import ImageDtype, Statistics

BLACK_BELOW = 3 / 255
"""An image whose largest value is lower is black."""
CONSTANT_BELOW = 1 / 255
"""An image whose channels each vary by less is constant."""
FAR_OUTSIDE = (-2.0, 3.0)
"""An image with values below or above is no image in 0..1; synthesis stays far inside even without cutting off."""
SATURATED_SHARE = 0.9
"""An image with at least this share of values at or beyond 0 or 1 is saturated."""


class QualityReport(Settings):
    """Positions of suspicious images, by kind."""

    count: int
    """Images looked at."""
    black: tuple[int, ...] = ()
    """All values near 0."""
    constant: tuple[int, ...] = ()
    """Each channel has one value (and the image is not black)."""
    nan: tuple[int, ...] = ()
    """Holds NaN or infinity."""
    duplicate: tuple[int, ...] = ()
    """The same pixels as an earlier image."""
    outside: tuple[int, ...] = ()
    """Holds values far outside 0..1."""
    saturated: tuple[int, ...] = ()
    """Nearly all values at the ends of 0..1 or beyond."""

    def warnings(self) -> list[str]:
        """Return one line for each kind that was found."""
        kinds = {
            "black": self.black,
            "constant": self.constant,
            "not finite (NaN or infinity)": self.nan,
            "duplicates of earlier ones": self.duplicate,
            f"far outside 0..1 (below {FAR_OUTSIDE[0]:g} or above {FAR_OUTSIDE[1]:g}; 0 is black and 1 is white)": (
                self.outside
            ),
            "saturated (values at or beyond 0 or 1)": self.saturated,
        }
        return [
            f"{len(found)} of {self.count} images are {kind}: {_listed(found)}"
            for kind, found in kinds.items()
            if found
        ]


class ImageScan:
    """Gathers statistics and defects; its result does not depend on how the images were batched."""

    def __init__(self) -> None:
        self.count = 0
        self._sizes: set[tuple[int, int]] = set()
        self._dtypes: set[ImageDtype] = set()
        self._found: dict[str, list[int]] = {"black": [], "constant": [], "nan": [], "outside": [], "saturated": []}
        self._digests = array("Q")  # 8 bytes an image: a million images stay small
        self._positions = array("Q")
        self._pixels = self._outside = 0
        self._sum = self._sum_of_squares = np.zeros(0)  # of each channel
        self._min = np.inf
        self._max = -np.inf

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width, if all images share them."""
        return next(iter(self._sizes)) if len(self._sizes) == 1 else None

    @property
    def dtype(self) -> ImageDtype:
        """Pixel type that holds all images."""
        return "float16" if "float16" in self._dtypes else "uint8"

    def add(self, images: Iterable[Tensor], positions: Iterable[int] | None = None) -> None:
        """Look at images `[C,h,w]`, uint8 or float16; without `positions` they count on from the last call."""
        numbers = itertools.count(self.count) if positions is None else positions
        for image, position in zip(images, numbers, strict=False):
            self._add(image.numpy(), position)

    def report(self) -> QualityReport:
        """Return the defects found so far."""
        digests = np.frombuffer(self._digests, np.uint64) if self._digests else np.zeros(0, np.uint64)
        _, first = np.unique(digests, return_index=True)
        repeated = np.ones(len(digests), bool)
        repeated[first] = False
        positions = np.frombuffer(self._positions, np.uint64) if self._positions else np.zeros(0, np.uint64)
        return QualityReport(
            count=self.count,
            black=tuple(self._found["black"]),
            constant=tuple(self._found["constant"]),
            nan=tuple(self._found["nan"]),
            duplicate=tuple(positions[repeated].tolist()),
            outside=tuple(self._found["outside"]),
            saturated=tuple(self._found["saturated"]),
        )

    def statistics(self) -> Statistics | None:
        """Return the statistics of all finite images so far; none if there is none."""
        if not self._pixels:
            return None
        mean = self._sum / self._pixels
        std = np.sqrt(np.maximum(self._sum_of_squares / self._pixels - mean**2, 0))
        return Statistics(
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            min=float(self._min),
            max=float(self._max),
            outside=self._outside / (self._pixels * len(mean)),
        )

    def _add(self, image: np.ndarray, position: int) -> None:
        self.count += 1
        self._positions.append(position)
        self._sizes.add((image.shape[1], image.shape[2]))
        self._dtypes.add("uint8" if image.dtype == np.uint8 else "float16")
        digest = hashlib.blake2b(f"{image.shape} {image.dtype}".encode(), digest_size=8)
        digest.update(np.ascontiguousarray(image).data)
        self._digests.append(int.from_bytes(digest.digest(), "big"))
        # float32 holds both pixel types exactly; sums are taken in float64.
        values = image.reshape(len(image), -1).astype(np.float32)
        scale = 255.0 if image.dtype == np.uint8 else 1.0
        low, high = values.min(axis=1).astype(np.float64) / scale, values.max(axis=1).astype(np.float64) / scale
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            self._found["nan"].append(position)
            return
        if low.min() < FAR_OUTSIDE[0] or high.max() > FAR_OUTSIDE[1]:
            self._found["outside"].append(position)
        if high.max() < BLACK_BELOW and low.min() > -BLACK_BELOW:
            self._found["black"].append(position)
        elif (high - low).max() < CONSTANT_BELOW:
            self._found["constant"].append(position)
        elif np.count_nonzero((values <= 0) | (values >= scale)) >= SATURATED_SHARE * values.size:
            self._found["saturated"].append(position)
        if not self._pixels:
            self._sum, self._sum_of_squares = np.zeros(len(image)), np.zeros(len(image))
        if len(self._sum) != len(image):
            raise DataError(f"images of {len(self._sum)} and of {len(image)} channels are in one set; make them alike")
        self._pixels += values.shape[1]
        self._outside += int(np.count_nonzero((values < 0) | (values > scale)))
        self._sum += values.sum(axis=1, dtype=np.float64) / scale
        self._sum_of_squares += np.square(values, dtype=np.float64).sum(axis=1) / scale**2
        self._min = min(self._min, float(low.min()))
        self._max = max(self._max, float(high.max()))


def _listed(indices: tuple[int, ...]) -> str:
    shown = ", ".join(str(index) for index in indices[:5])
    return shown + (", ..." if len(indices) > 5 else "")
