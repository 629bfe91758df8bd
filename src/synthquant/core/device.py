"""Which device work is done on."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> str:
    """Return `cuda` or `cpu` for `auto`, and any other name as it is."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
