"""`doctor`: what this machine and installation have."""

from __future__ import annotations

from typing import Any

import torch

from synthquant.cli import options
from synthquant.cli.output import print_json
from synthquant.core.cpu import cpu_flags, has_vnni
from synthquant.core.extras import extras
from synthquant.core.formatting import size
from synthquant.core.free_memory import free_memory
from synthquant.core.record import environment

_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def doctor(json: options.Json = False) -> None:
    """Say which versions, optional packages, processor features, memory and GPUs there are, for reports of problems."""
    found = {
        **environment(),
        "features": [name for name in _FEATURES if name in cpu_flags()],
        "vnni": has_vnni(),
        "free_memory_bytes": free_memory(torch.device("cpu")),
        "gpus": [_gpu(number) for number in range(torch.cuda.device_count())],
        "extras": extras(),
    }
    print_json(found) if json else _print(found)


def _gpu(number: int) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(number)
    return {"name": torch.cuda.get_device_name(number), "free_memory_bytes": free, "memory_bytes": total}


def _print(found: dict[str, Any]) -> None:
    features = ", ".join(found["features"]) or "none known"
    rows = {
        "synthquant": found["synthquant"],
        "python": f"{found['python']}, {found['platform']}",
        "torch": f"{found['torch']}, {found['threads']} threads",
        "cpu": found["cpu"],
        "features": f"{features}; {'' if found['vnni'] else 'no '}8-bit dot products (VNNI)",
        "memory": f"{size(found['free_memory_bytes'])} free",
        "allocator": found["allocator"],
        "gpu": "; ".join(
            f"{gpu['name']}, {size(gpu['free_memory_bytes'])} of {size(gpu['memory_bytes'])} free"
            for gpu in found["gpus"]
        )
        or "none",
    }
    for extra, packages in found["extras"].items():
        there = ", ".join(f"{name} {version}" for name, version in packages.items() if version is not None)
        missing = [name for name, version in packages.items() if version is None]
        advice = f"{', '.join(missing)} missing: pip install 'synthquant[{extra}]'" if missing else ""
        rows[f"[{extra}]"] = "; ".join(filter(None, (there, advice)))
    for name, text in rows.items():
        print(f"{name:<14}{text}")
