"""How much memory is free for this process, on a device or in main memory."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

GIB = 2**30

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
# What version 1 writes where there is no limit is of this size or above.
_NO_LIMIT = 2**60


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a device; on CUDA what PyTorch keeps and does not use is among them.

    Elsewhere it is main memory: the least of what the system has available, what the process's control groups leave
    (Docker, Slurm, systemd), and what its own limits leave (`ulimit -v`, `ulimit -d`).
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return max(0, min([_available(), *_left_by_groups(), *_left_by_own_limits()]))


def _available() -> int:
    """What the system would give without swapping: on Linux with the files it would drop from memory."""
    if found := _number(_PROC / "meminfo", r"MemAvailable:\s+(\d+) kB"):
        return found * 1024
    if sys.platform == "win32":
        return _available_on_windows()
    page = os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return page * os.sysconf("SC_AVPHYS_PAGES")
    return page * os.sysconf("SC_PHYS_PAGES") // 2  # macOS tells how much there is, not how much is free


def _available_on_windows() -> int:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((f"value{index}", ctypes.c_ulonglong) for index in range(7)),
        ]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return int(status.value1)


def _left_by_groups() -> Iterator[int]:
    """What each control group of this process leaves, from its own up to the root."""
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if not kinds:
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            limit = _number(folder / names[0], r"(\d+)")
            used = _number(folder / names[1], r"(\d+)")
            if limit is not None and used is not None and limit < _NO_LIMIT:
                # Files that nobody has looked at lately are given up when memory is short.
                yield limit - used + (_number(folder / "memory.stat", rf"(?m)^{names[2]} (\d+)") or 0)
            if folder == root:
                break


def _left_by_own_limits() -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    if sys.platform != "linux":
        return
    import resource

    for kind, line in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        used = _number(_PROC / "self/status", rf"{line}:\s+(\d+) kB")
        if limit != resource.RLIM_INFINITY and used is not None:
            yield limit - used * 1024


def _number(file: Path, pattern: str) -> int | None:
    """The first number that a file has at a place, if it can be read and has one."""
    try:
        found = re.search(pattern, file.read_text())
    except OSError:
        return None
    return int(found[1]) if found else None
