"""ReLU6 and other clips whose gradient needs their result alone, as that of ReLU does.

PyTorch keeps the input of a clip for its gradient, and copies it first where the clip works in place: two tensors in
memory where the next layer keeps the result anyway. Inside the range input and result are the same, so that the result
tells as well where the gradient goes; not a bit of it changes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from synthquant.core.modules import forwards_replaced


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


def save_results(network: nn.Module) -> None:
    """Let all clips of a network save their results for the gradient, for good."""
    for clip in _clips(network):
        clip.__dict__["forward"] = partial(_clipped, clip)


def saved_results(network: nn.Module) -> AbstractContextManager[None]:
    """Let all clips of a network save their results for a while."""
    return forwards_replaced((clip, partial(_clipped, clip)) for clip in _clips(network))


def _clips(network: nn.Module) -> list[nn.Module]:
    """Clips that run the forward of their class."""
    clips = [part for part in network.modules() if type(part).forward is nn.Hardtanh.forward]
    return [clip for clip in clips if "forward" not in clip.__dict__]


def _clipped(clip: Any, inputs: Tensor) -> Tensor:
    return hardtanh(inputs, clip.min_val, clip.max_val, clip.inplace)


def hardtanh(inputs: Tensor, low: float, high: float, inplace: bool) -> Tensor:
    """As the function of this name in torch, also to those who watch or replace functions of torch."""
    if has_torch_function_unary(inputs):
        seen: Tensor = handle_torch_function(hardtanh, (inputs,), inputs, low, high, inplace)
        return seen
    if not (torch.is_grad_enabled() and inputs.requires_grad):
        return nn.functional.hardtanh(inputs, low, high, inplace)
    result: Tensor = _Clip.apply(inputs, low, high, inplace)
    return result
