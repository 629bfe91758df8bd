"""Writing a trajectory while it is being recorded, so that a killed run continues with the parts that are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from synthquant.core.differences import differences, flat
from synthquant.core.errors import DataError, OutputError
from synthquant.core.files import make_folder, require_writable, sha256_bytes, sha256_file, write_bytes
from synthquant.core.locks import remove_leftovers
from synthquant.core.progress import QUIET, Progress
from synthquant.data.manifest import TRAJECTORY_NAME
from synthquant.diffusion.trajectory import Trajectory
from synthquant.diffusion.trajectory_manifest import (
    UNFINISHED_NAME,
    TrajectoryManifest,
    TrajectoryPart,
    read_trajectory_manifest,
    write_trajectory_manifest,
)

# What tells two of them apart, the most telling first; other fields follow from these.
_IDENTITY = ("pipeline", "scheduler.class", "method", "count", "settings", "seed")


class TrajectoryWriter:
    """Writes a trajectory part by part into a new, an unfinished or a finished folder.

    Opened again after a kill for the same trajectory, it goes on with the parts that are missing or not as they were
    written, and ends with the same bytes as an uninterrupted run.
    """

    def __init__(self, folder: Path | str, progress: Progress = QUIET) -> None:
        self.folder = Path(folder)
        self._progress = progress
        self._manifest: TrajectoryManifest | None = None
        self._sizes: Sequence[int] = ()
        self._parts: dict[int, TrajectoryPart] = {}

    def begin(self, manifest: TrajectoryManifest, sizes: Sequence[int]) -> list[int]:
        """Take what the trajectory is, without its parts, and the images of each; returns which parts are to be made.

        Raises `DataError` if the folder holds another trajectory, or does not say of what; `OutputError` if it holds
        other things or cannot be written.
        """
        self._manifest, self._sizes = manifest, sizes
        paths = [self.folder / name for name in (TRAJECTORY_NAME, UNFINISHED_NAME)]
        there = [path for path in paths if path.is_file()]
        if there:
            self._take_up(there[0])
        else:
            require_writable(self.folder)
            remove_leftovers(self.folder)
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise OutputError(
                    f"{self.folder} is not empty and holds no trajectory; choose another folder or empty it"
                )
            make_folder(self.folder)
        missing = [index for index in range(len(sizes)) if index not in self._parts]
        if missing:
            # In this order: killed in between, it is still a finished one with parts missing.
            self._write(UNFINISHED_NAME)
            (self.folder / TRAJECTORY_NAME).unlink(missing_ok=True)
        return missing

    def append(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the part of this number."""
        path = self.folder / f"part-{index:05d}.safetensors"
        # Without metadata, whose order differs from one write to the next.
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        write_bytes(path, data)
        self._parts[index] = TrajectoryPart(name=path.name, images=self._sizes[index], sha256=sha256_bytes(data))
        self._write(UNFINISHED_NAME)

    def finish(self) -> Trajectory:
        """Write the manifest and return the trajectory; raises `DataError` if parts are missing."""
        if len(self._parts) < len(self._sizes):
            raise DataError(f"{self.folder} has {len(self._parts)} of {len(self._sizes)} parts")
        if not (self.folder / TRAJECTORY_NAME).is_file():
            self._write(TRAJECTORY_NAME)
        (self.folder / UNFINISHED_NAME).unlink(missing_ok=True)
        return Trajectory.open(self.folder)

    def _take_up(self, path: Path) -> None:
        """Learn which parts of a former sitting are as they were written."""
        assert self._manifest is not None
        found = read_trajectory_manifest(path)
        left_out = {"source", "parts"}
        there, wanted = (flat(one.model_dump(mode="json", exclude=left_out)) for one in (found, self._manifest))
        if differing := differences(there, wanted, first=_IDENTITY):
            raise DataError(f"{self.folder} holds another trajectory ({differing}); choose another folder or remove it")
        self._manifest = self._manifest.model_copy(update={"source": found.source})
        remove_leftovers(self.folder)
        for part in found.parts:
            index = int(part.name.partition("-")[2].partition(".")[0])
            file = self.folder / part.name
            if file.is_file() and sha256_file(file) == part.sha256:
                self._parts[index] = part
            else:
                self._progress.warn(f"{file} is missing or not as it was written; it is made again")

    def _write(self, name: str) -> None:
        assert self._manifest is not None
        parts = tuple(self._parts[index] for index in sorted(self._parts))
        write_trajectory_manifest(self.folder / name, self._manifest.model_copy(update={"parts": parts}))
