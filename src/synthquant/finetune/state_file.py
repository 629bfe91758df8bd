"""Where a training stands, on disk, so that a killed one goes on to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from synthquant.core.errors import DataError, InputError
from synthquant.core.files import sha256_bytes
from synthquant.core.progress import QUIET, Progress
from synthquant.core.run_metrics import FineTunePoint
from synthquant.core.tensor_file import read_sealed_tensors, write_sealed_tensors

_NAME = "training.safetensors"
_BETWEEN = "|"


@dataclass
class TrainingState:
    """All that decides how a training goes on."""

    step: int = 0
    """Steps that were made."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Parts by name, each with its tensors by name."""
    points: list[FineTunePoint] = field(default_factory=list)
    """What was measured so far."""
    diverged: bool = False
    """It ended before its time."""


class StateFile:
    """The state of one training in a folder; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, made_from: object, progress: Progress = QUIET) -> None:
        """Keep the state of the training that `made_from`, all that decides it, stands for."""
        self._path = None if folder is None else folder / _NAME
        self._key = sha256_bytes(repr(made_from).encode())
        self._progress = progress

    def load(self) -> TrainingState | None:
        """Read the state, if there is one that is as it was written.

        Raises `DataError` if it is that of another training.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            found = read_sealed_tensors(self._path)
        except InputError:
            self._progress.warn(f"{self._path} is not as it was written (its hash does not fit); training starts again")
            return None
        if found.texts["made_from"] != self._key:
            raise DataError(
                f"{self._path} is the state of another training (another start, other images, settings or seed);"
                " give an empty folder, or remove it"
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in found.tensors.items():
            part, _, own = name.partition(_BETWEEN)
            parts.setdefault(part, {})[own] = tensor
        texts = json.loads(found.texts["progress"])
        points = [FineTunePoint.model_validate(point) for point in texts["points"]]
        return TrainingState(texts["step"], parts, points, texts["diverged"])

    def save(self, state: TrainingState) -> None:
        """Write the state, atomically, over the one before."""
        if self._path is None:
            return
        tensors: Mapping[str, Tensor] = {
            f"{part}{_BETWEEN}{name}": tensor for part, own in state.tensors.items() for name, tensor in own.items()
        }
        points = [point.model_dump(mode="json") for point in state.points]
        texts = {"step": state.step, "points": points, "diverged": state.diverged}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed_tensors(self._path, tensors, {"made_from": self._key, "progress": json.dumps(texts)})
