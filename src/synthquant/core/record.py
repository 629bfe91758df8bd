"""What a run did, with what, on what: `run.json`."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError

from synthquant.core.allocator import ALLOCATOR
from synthquant.core.errors import InputError
from synthquant.core.files import read_sealed_json, write_sealed_json
from synthquant.core.run_metrics import METRICS, Metrics
from synthquant.core.version import package_version

_VERSION = 2
# The format before it had a hash of itself; its fields are the same.
_UNSEALED = {"version": 1}

M = TypeVar("M", bound=Metrics)
StageStatus = Literal["pending", "running", "done", "failed"]


class StageRecord(BaseModel):
    """One stage of a run."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)

    status: StageStatus = "pending"
    """How far the stage came."""
    seconds: float = Field(default=0.0, ge=0, strict=True, allow_inf_nan=False)
    """Wall time, all sittings of a resumed stage together."""
    peak_memory_bytes: int | None = Field(default=None, ge=0, strict=True)
    """Highest memory use, on the device that did the work; none where the system does not say."""
    metrics: dict[str, Any] = {}
    """What the stage measured, JSON values only; `core.run_metrics` says what."""


class RunRecord(BaseModel):
    """All that is needed to trust, repeat or resume a run."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)

    version: int = _VERSION
    """Version of this file's format."""
    stages: dict[str, StageRecord] = {}
    """Stages by name."""
    environment: dict[str, StrictStr] = {}
    """Versions and hardware, see `environment`."""
    seed: int = 0
    """The run's seed."""
    recipe: dict[str, Any] = {}
    """The resolved recipe."""

    def stage(self, name: str) -> StageRecord:
        """Return the record of a stage, made now if there is none."""
        return self.stages.setdefault(name, StageRecord())

    def metrics(self, stage: str, kind: type[M]) -> M:
        """Return what a stage measured, by name and type; all keys are at their defaults where it measured nothing."""
        return kind.model_validate(self.stages[stage].metrics if stage in self.stages else {})

    @property
    def image_source(self) -> str | None:
        """Where the images were taken from, in the form `open_images` takes; none if the run made them."""
        images = self.recipe.get("images")
        source = images.get("source") if isinstance(images, dict) else None
        return source if isinstance(source, str) else None

    def save(self, path: Path | str) -> None:
        """Write the record as JSON with a hash of its content, atomically; raises `OutputError`."""
        write_sealed_json(Path(path), self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path | str) -> RunRecord:
        """Read a record.

        Raises `InputError` if the file is missing, broken, of another version, not as it was written, or says what no
        run can have measured.
        """
        content = read_sealed_json(Path(path), unsealed=_UNSEALED)
        if content.get("version") not in (1, _VERSION):
            raise InputError(f"{path} has format version {content.get('version')!r}, this release reads {_VERSION}")
        try:
            record = cls.model_validate(content | {"version": _VERSION})
        except ValidationError as error:
            raise InputError(f"{path} is not the record of a run: {_first(error)}") from error
        for name, stage in record.stages.items():
            if name not in METRICS and name not in record.recipe:  # a stage that a recipe adds is a section of it
                raise InputError(f"{path} is not the record of a run: there is no stage {name!r}")
            try:
                found = METRICS.get(name, Metrics).model_validate(stage.metrics)
            except ValidationError as error:
                raise InputError(f"{path}: stages.{name}.metrics.{_first(error)}") from error
            missing = [key for key in found.required if getattr(found, key) is None]
            if stage.status == "done" and missing:
                raise InputError(f"{path}: stages.{name}.metrics.{missing[0]} is missing; make the run again")
        return record


def _first(error: ValidationError) -> str:
    """Where the first fault is, and what it is."""
    found = error.errors()[0]
    return f"{'.'.join(str(part) for part in found['loc'])}: {found['msg']}"


def environment(device: str | torch.device = "cpu") -> dict[str, str]:
    """Return versions and hardware that a result depends on, all as text."""
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "synthquant": package_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "allocator": ALLOCATOR.state,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def reset_peak_memory(device: str | torch.device = "cpu") -> bool:
    """Start a new count for `peak_memory_bytes`; returns whether the system can do so."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    ALLOCATOR.give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    except OSError:
        return False
    return True


def peak_memory_bytes(device: str | torch.device = "cpu") -> int | None:
    """Return the highest memory use since the last reset, or since the start where it cannot be reset.

    On CUDA the bytes PyTorch allocated, elsewhere the resident memory of this process; none if the system does not say.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        return f"{found[1].strip()} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"
