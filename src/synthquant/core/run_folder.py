"""A folder that a flow of stages fills, and that a later call can take up again.

RUN/  recipe.yaml  run.json  images/  selected/  model/  last/  model.onnx  report.html   (work/ until it is finished)
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from synthquant.core.differences import differences, flat
from synthquant.core.errors import InputError, OutputError
from synthquant.core.files import require_writable
from synthquant.core.locks import remove_leftovers
from synthquant.core.record import RunRecord, StageRecord, environment, peak_memory_bytes, reset_peak_memory

# What tells one run from another at a glance; other settings are often different because of these.
_TELLING = (
    *("model", "images.source", "images.method", "images.count", "select"),
    *("quantize.scheme.preset", "quantize.scheme", "quantize.method", "seed"),
)

RECORD_NAME = "run.json"
"""The record of a run in its folder."""
_IMAGES, _SELECTED = "images", "selected"


def images_of(folder: Path) -> Path | None:
    """Return the image set in a run's folder that it quantized with: the choice from its pool, or all that it made."""
    return next((folder / name for name in (_SELECTED, _IMAGES) if (folder / name).is_dir()), None)


class RunFolder:
    """A run on disk: its files and its record, which is saved whenever a stage begins or ends.

    Args:
        path: the folder; it is made when the first stage begins.
        recipe: the resolved recipe, plain data.
        device: where the stages compute, for time, memory and environment.
        seed: the run's seed.
        place: paths of recipe settings that say where a run is computed, not what: a run may go on with others.

    The section of a recipe that is named like a stage may also change until that stage begins.

    Raises:
        InputError: the folder holds a run of another recipe.
        OutputError: the folder cannot be written, or holds something that is not a run.
    """

    def __init__(
        self, path: Path, recipe: Mapping[str, Any], *, device: str, seed: int, place: Collection[str] = ()
    ) -> None:
        self.path = path
        self.device = device
        require_writable(path)
        self._require_places()
        if (path / RECORD_NAME).exists():
            self.record = RunRecord.load(path / RECORD_NAME)
            self._require_same(recipe, place)
            self.record.recipe = dict(recipe)
            remove_leftovers(path, deep=True)
        elif path.is_dir() and any(path.iterdir()):
            raise OutputError(f"{path} is not empty and not a run folder; choose another --out")
        else:
            self.record = RunRecord(seed=seed, recipe=dict(recipe))

    @property
    def images(self) -> Path:
        """The image set the run made."""
        return self.path / _IMAGES

    @property
    def selected(self) -> Path:
        """The images chosen from the run's pool."""
        return self.path / _SELECTED

    @property
    def checkpoint(self) -> Path:
        """The quantized network."""
        return self.path / "model"

    @property
    def last(self) -> Path:
        """The network of the last step of fine-tuning, where the best one is the result."""
        return self.path / "last"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def work(self) -> Path:
        """What only a resumed run needs; gone when the run is finished."""
        return self.path / "work"

    def is_done(self, *stages: str) -> bool:
        """Return whether all these stages are finished."""
        return all(name in self.record.stages and self.record.stages[name].status == "done" for name in stages)

    def reopen(self, *stages: str) -> None:
        """Let stages that are done be done again; what they measured stays until then."""
        for name in stages:
            if self.is_done(name):
                self.record.stages[name].status = "failed"
        self._save()

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Mark a stage as running, then as done or failed, with time and memory; yields the dict of its metrics."""
        stage = self.record.stage(name)
        stage.status, seconds_before = "running", stage.seconds
        self.record.environment = environment(self.device)
        self._save()
        metrics: dict[str, Any] = {}
        reset_peak_memory(self.device)
        start = time.perf_counter()
        try:
            yield metrics
            stage.metrics = metrics
            stage.status = "done"
        except BaseException:
            stage.status = "failed"
            with suppress(OutputError):  # of a full disk: what came first says more
                self._end(stage, seconds_before, start)
            raise
        self._end(stage, seconds_before, start)

    def _end(self, stage: StageRecord, seconds_before: float, start: float) -> None:
        stage.seconds = seconds_before + time.perf_counter() - start
        stage.peak_memory_bytes = peak_memory_bytes(self.device)
        self._save()

    def _require_places(self) -> None:
        """Raise `OutputError` if a file is where the run makes a folder, or the other way round: known before work."""
        for one in (self.images, self.selected, self.checkpoint, self.last, self.work):
            if not one.is_dir() and (one.exists() or one.is_symlink()):
                raise OutputError(f"{one} is in the way: a run has a folder there; move it away")
        for one in (self.path / "recipe.yaml", self.path / RECORD_NAME, self.report):
            if one.is_dir():
                raise OutputError(f"{one} is in the way: a run has a file there; move it away")

    def _require_same(self, recipe: Mapping[str, Any], place: Collection[str]) -> None:
        before, after = flat(self.record.recipe), flat(recipe)
        # A stage that a recipe may lack can only be added as long as the stage behind it has not begun.
        behind = {"images": (), "select": ("quantize",), "quantize": (), "finetune": ("checkpoint",), "evaluate": ()}
        behind |= {"held_out": (), "export": (), "benchmark": ()}
        free = [name for name, later in behind.items() if not any(map(self._begun, (name, *later)))]
        differing = differences(
            {name: value for name, value in before.items() if name not in place and name.partition(".")[0] not in free},
            {name: value for name, value in after.items() if name not in place and name.partition(".")[0] not in free},
            first=_TELLING,
        )
        if differing:
            raise InputError(
                f"{self.path} holds a run of another recipe ({differing}); choose another --out or remove the folder"
            )

    def _begun(self, stage: str) -> bool:
        return stage in self.record.stages and self.record.stages[stage].status != "pending"

    def _save(self) -> None:
        self.record.save(self.path / RECORD_NAME)
