"""Which device work is done on."""

from __future__ import annotations

import torch

from synthquant.core.errors import InputError


def resolve_device(name: str) -> str:
    """Return the device that a name means: `cpu`, `cuda`, `cuda:1`, `mps`, ...; for `auto` `cuda` if there is one.

    Raises `InputError` for a name that means none, or one that this machine does not have; nothing is allocated.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            f"device {name!r} cannot be used: no device is called so; choose auto, cpu, cuda, ..."
        ) from None
    if device.type == "cpu":
        if device.index:
            raise InputError(f"device {name!r} cannot be used: there is one cpu; choose cpu")
        return "cpu"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind, count = (accelerator.type, torch.accelerator.device_count()) if accelerator else ("", 0)
    if device.type != kind or (device.index or 0) >= count:
        there = (
            f"there are {count}" if device.type == kind else "this machine has none, or PyTorch was built without it"
        )
        raise InputError(
            f"device {name!r} cannot be used: {there}; choose {', '.join(filter(None, ('auto, cpu', kind)))}"
        )
    return name
