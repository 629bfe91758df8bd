"""ReLU6 and other clips whose gradient needs their result alone, as that of ReLU does.

PyTorch keeps the input of a clip for its gradient, and copies it first where the clip works in place: two tensors in
memory where the next layer keeps the result anyway. Inside the range input and result are the same, so that the result
tells as well where the gradient goes; not a bit of it changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        ctx.range = (low, high)
        if inplace:
            ctx.mark_dirty(inputs)
        result = nn.functional.hardtanh(inputs, low, high, inplace)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], result, *ctx.range), None, None, None


def save_results(network: nn.Module) -> list[nn.Module]:
    """Let all clips of a network save their results for the gradient; returns the clips that were changed."""
    clips = [part for part in network.modules() if type(part).forward is nn.Hardtanh.forward]
    changed = [part for part in clips if "forward" not in part.__dict__]
    for clip in changed:
        clip.__dict__["forward"] = partial(_clipped, clip)
    return changed


@contextmanager
def saved_results(network: nn.Module) -> Iterator[None]:
    """Let all clips of a network save their results for a while."""
    changed = save_results(network)
    try:
        yield
    finally:
        for clip in changed:
            del clip.__dict__["forward"]


def _clipped(clip: Any, inputs: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and inputs.requires_grad):
        return nn.functional.hardtanh(inputs, clip.min_val, clip.max_val, clip.inplace)
    result: Tensor = _Clip.apply(inputs, clip.min_val, clip.max_val, clip.inplace)
    return result
