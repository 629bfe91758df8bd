"""The least that any limit leaves is what is free."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from synthquant.core import free_memory as module
from synthquant.core.free_memory import GIB, free_memory

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB available and no groups."""
    monkeypatch.setattr(module, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "groups")
    write(tmp_path / "proc/meminfo", f"MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:   {8 * 2**20} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_what_the_system_has_available_counts_not_what_nobody_uses(machine: Path) -> None:
    assert free_memory(CPU) == 8 * GIB


def test_a_group_or_one_above_it_may_leave_less(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/job/step\n")
    for name, limit, used, idle in (("job", 4 * GIB, 3 * GIB, GIB // 2), ("job/step", "max", GIB, 0)):
        write(machine / f"groups/{name}/memory.max", f"{limit}\n")
        write(machine / f"groups/{name}/memory.current", f"{used}\n")
        write(machine / f"groups/{name}/memory.stat", f"anon 5\ninactive_file {idle}\nactive_file 7\n")
    assert free_memory(CPU) == GIB + GIB // 2
    write(machine / "groups/job/step/memory.max", f"{GIB + 100}\n")
    assert free_memory(CPU) == 100
    write(machine / "groups/job/step/memory.current", f"{2 * GIB}\n")
    assert free_memory(CPU) == 0


def test_groups_of_the_first_version(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "9:cpu,cpuacct:/box\n4:memory:/box\n0::/\n")
    folder = machine / "groups/memory"
    write(folder / "memory.limit_in_bytes", "9223372036854771712\n")
    write(folder / "memory.usage_in_bytes", "9223372036854771712\n")
    write(folder / "box/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(folder / "box/memory.usage_in_bytes", f"{GIB}\n")
    write(folder / "box/memory.stat", "inactive_file 999\ntotal_inactive_file 24\n")
    assert free_memory(CPU) == GIB + 24


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_the_process_s_own_limits(kind: str) -> None:
    script = f"""
import resource, torch
from synthquant.core.free_memory import free_memory
cpu = torch.device("cpu")
before = free_memory(cpu)
line = {{"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}}["{kind}"]
used = next(int(row.split()[1]) * 1024 for row in open("/proc/self/status") if row.startswith(line))
resource.setrlimit(resource.{kind}, (used + 2**28, used + 2**28))
left = free_memory(cpu)
assert 0 < left <= 2**28 < before, (left, before)
try:
    torch.ones(2**28)
except RuntimeError:
    print("as said")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout == "as said\n", result.stderr


def test_on_cuda_what_pytorch_keeps_unused_is_free_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    assert free_memory(torch.device("cuda")) == 6 * GIB
