"""A denoiser's own calibration data: what its sampler gave it, of some images at some steps."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.files import sha256_bytes, sha256_file
from synthquant.data.codec import MAX_PIXELS
from synthquant.data.image_set import ImageSet
from synthquant.data.manifest import TRAJECTORY_NAME
from synthquant.data.sources import open_images
from synthquant.diffusion.trajectory_form import rows_of
from synthquant.diffusion.trajectory_manifest import (
    UNFINISHED_NAME,
    TrajectoryManifest,
    read_trajectory_manifest,
)
from synthquant.models.signature import Inputs, joined

PartTensors = Mapping[str, Tensor]

# Parts that are kept in memory while rows are read: one after the other, or a few in turns.
_KEPT = 2


class Trajectory:
    """Rows of what a denoiser was given, `models.samples.Samples`; its files are read when rows are asked for.

    Rows of one image follow each other in the order of its steps; with guidance each step has two, without condition
    and with it. So the first rows of a set are of all steps.

    Args:
        manifest: what it says about itself.
        folder: where its parts are, or the parts themselves.
        chosen: rows of the whole that this is a choice of, in their order; none: all.
    """

    def __init__(
        self, manifest: TrajectoryManifest, folder: Path | Sequence[PartTensors], chosen: Sequence[int] | None = None
    ) -> None:
        self.manifest = manifest
        self._folder = folder
        self._chosen = torch.arange(manifest.rows) if chosen is None else torch.as_tensor(list(chosen))
        self._first = [0, *accumulate(part.images for part in manifest.parts)]
        self._read: OrderedDict[int, PartTensors] = OrderedDict()

    @classmethod
    def open(cls, folder: Path | str) -> Trajectory:
        """Open a finished trajectory; raises `DataError` if it is none, unfinished, or a part is missing."""
        folder = Path(folder)
        if not (folder / TRAJECTORY_NAME).is_file():
            if (folder / UNFINISHED_NAME).is_file():
                raise DataError(f"{folder} is an unfinished trajectory; run the command that makes it again")
            raise DataError(f"{folder} is not a trajectory: it has no {TRAJECTORY_NAME}")
        manifest = read_trajectory_manifest(folder / TRAJECTORY_NAME)
        missing = [part.name for part in manifest.parts if not (folder / part.name).is_file()]
        if missing or sum(part.images for part in manifest.parts) != len(manifest.seeds):
            what = f"{missing[0]} is missing" if missing else "its parts are not all of its images"
            raise DataError(f"{folder}: {what}; run the command that makes it again")
        return cls(manifest, folder)

    def verify(self) -> None:
        """Raise `DataError` if a part is not as it was written."""
        for part in self.manifest.parts if isinstance(self._folder, Path) else ():
            path = Path(str(self._folder)) / part.name
            if not path.is_file() or sha256_file(path) != part.sha256:
                raise _changed(path)

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return str(self._folder) if isinstance(self._folder, Path) else "the trajectory"

    @cached_property
    def fingerprint(self) -> str:
        """Hash that changes when what the network is given changes."""
        manifest = self.manifest
        parts = " ".join(part.sha256 for part in manifest.parts)
        text = f"{manifest.arguments} {manifest.steps} {manifest.repeats} {self._chosen.tolist()} {parts}"
        return sha256_bytes(text.encode())

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._chosen)

    @property
    def steps(self) -> Tensor:
        """Which of the sampler's steps each row is of, counted from 0, int64 `[rows]`."""
        places = self._chosen % self._rows_of_image // self.manifest.repeats
        return torch.tensor(self.manifest.steps)[places]

    @property
    def images(self) -> Tensor:
        """Which image each row is of, int64 `[rows]`."""
        return self._chosen // self._rows_of_image

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The time of each step that the sampler made, also of those that were not recorded."""
        return self.manifest.timesteps

    @property
    def is_consecutive(self) -> bool:
        """Whether rows of each image are of steps that follow each other, at least two, as the sampler made them."""
        images, steps = self.images, self.steps
        same = images[1:] == images[:-1]
        apart = (steps[1:] - steps[:-1])[same]
        # With guidance rows of a step come twice.
        follows = bool(((apart == 1) | (apart == 0)).all()) and bool((apart == 1).any())
        return follows and len(torch.unique_consecutive(images)) == len(torch.unique(images))

    def subset(self, rows: Sequence[int]) -> Trajectory:
        """Return these rows of it, in this order."""
        return Trajectory(self.manifest, self._folder, self._chosen[torch.as_tensor(list(rows))].tolist())

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Inputs]:
        """Yield rows at these positions (all, if none are given) in order, `size` at a time, floats as float32.

        Raises `DataError` for a part that is not as it was written.
        """
        chosen = self._chosen if indices is None else self._chosen[torch.as_tensor(list(indices), dtype=torch.long)]
        for start in range(0, len(chosen), size):
            yield self._rows(chosen[start : start + size].tolist())

    @property
    def _rows_of_image(self) -> int:
        return len(self.manifest.steps) * self.manifest.repeats

    def _rows(self, rows: Sequence[int]) -> Inputs:
        repeats = self.manifest.repeats
        places = []
        for row in rows:
            image, rest = divmod(row, self._rows_of_image)
            part = bisect_right(self._first, image) - 1
            places.append((part, (image - self._first[part], rest // repeats, rest % repeats)))
        pieces = [
            rows_of(self._part(part), [place for _, place in group], self.manifest.arguments)
            for part, group in groupby(places, key=lambda entry: entry[0])
        ]
        return pieces[0] if len(pieces) == 1 else joined(pieces)

    def _part(self, index: int) -> PartTensors:
        if not isinstance(self._folder, Path):
            return self._folder[index]
        if index not in self._read:
            part = self.manifest.parts[index]
            path = self._folder / part.name
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}; run the command that makes it again") from error
            if sha256_bytes(data) != part.sha256:
                raise _changed(path)
            self._read[index] = load(data)
            while len(self._read) > _KEPT:
                self._read.popitem(last=False)
        return self._read[index]


def _changed(path: Path) -> DataError:
    return DataError(f"{path} is missing or not as it was written; run the command that makes it again")


def is_trajectory(source: Path | str) -> bool:
    """Return whether a folder is a trajectory, finished or not."""
    folder = Path(source).expanduser()
    return any((folder / name).is_file() for name in (TRAJECTORY_NAME, UNFINISHED_NAME))


def open_trajectory(folder: Path | str) -> Trajectory:
    """Open what `self_sampling` recorded; raises as `Trajectory.open`."""
    return Trajectory.open(Path(folder).expanduser())


def open_calibration(source: Path | str, *, max_pixels: int = MAX_PIXELS) -> ImageSet | Trajectory:
    """Open what a network is quantized with: images of any source, or a trajectory; raises as either does."""
    return open_trajectory(source) if is_trajectory(source) else open_images(source, max_pixels=max_pixels)
