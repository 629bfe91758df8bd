"""What a run did, with what, on what: `run.json`."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from synthquant.core.errors import InputError
from synthquant.core.files import read_json, write_json

StageStatus = Literal["pending", "running", "done", "failed"]


class StageRecord(BaseModel):
    """One stage of a run."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)

    status: StageStatus = "pending"
    """How far the stage came."""
    seconds: float = 0.0
    """Wall time, all sittings of a resumed stage together."""
    peak_memory_bytes: int | None = None
    """Highest memory use, on the device that did the work; none where the system does not say."""
    metrics: dict[str, Any] = {}
    """What the stage measured; JSON values only."""


class RunRecord(BaseModel):
    """All that is needed to trust, repeat or resume a run."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_assignment=True)

    version: int = 1
    """Version of this file's format."""
    stages: dict[str, StageRecord] = {}
    """Stages by name."""
    environment: dict[str, str] = {}
    """Versions and hardware, see `environment`."""
    seed: int = 0
    """The run's seed."""
    recipe: dict[str, Any] = {}
    """The resolved recipe."""

    def stage(self, name: str) -> StageRecord:
        """Return the record of a stage, made now if there is none."""
        return self.stages.setdefault(name, StageRecord())

    def save(self, path: Path | str) -> None:
        """Write the record as JSON, atomically; raises `OutputError`."""
        write_json(Path(path), self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path | str) -> RunRecord:
        """Read a record; raises `InputError` if the file is missing, broken or of another version."""
        content = read_json(Path(path))
        try:
            record = cls.model_validate(content)
        except ValidationError as error:
            raise InputError(f"{path} is not a run record: {error.errors()[0]['msg']}") from error
        if record.version != 1:
            raise InputError(f"{path} has format version {record.version}, this release reads version 1")
        return record


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
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def package_version() -> str:
    """Return the installed version of synthquant, or `unknown` when it runs from a bare source tree."""
    try:
        return metadata.version("synthquant")
    except metadata.PackageNotFoundError:
        return "unknown"


def reset_peak_memory(device: str | torch.device = "cpu") -> bool:
    """Start a new count for `peak_memory_bytes`; returns whether the system can do so."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
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
