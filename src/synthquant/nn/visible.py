"""Functions that hide several operations, as those operations, so that each of them can be quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from synthquant.nn.attention import visible_attention


def visible_silu(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """What `torch.nn.functional.silu` computes: a product with a sigmoid, for which runtimes have integer kernels.

    Args:
        input: of any shape.
        inplace: overwrite `input`.
    """
    gate = torch.sigmoid(input)
    return input.mul_(gate) if inplace else input * gate


ATTENTION: Mapping[str, Callable[..., Any]] = {"scaled_dot_product_attention": visible_attention}
"""Step by step forms of functions that hide products, by name."""

KERNELS: Mapping[str, Callable[..., Any]] = {**ATTENTION, "silu": visible_silu}
"""Those of all functions that hide what integer kernels read or put out."""
