"""Fake quantization and soft rounding as pure functions of tensors.

Every grid is written with unsigned codes `0 .. quant_max`, `quant_max = 2**bits - 1`, a positive `scale` and a
`zero_point`; a signed symmetric grid is the one with `zero_point = 2**(bits - 1)`. A code `q` stands for
`scale * (q - zero_point)`.
Rounding is half-to-even throughout (torch and ONNX agree on it).
"""

from __future__ import annotations

from typing import Any

import torch

# Stretch of the rectified sigmoid, AdaRound (arXiv:2004.10568), eq. 23.
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
# Smallest step: keeps constant and all-zero channels from dividing by zero.
SMALLEST_SCALE = 1e-8


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_max: int) -> torch.Tensor:
    """Codes of `x` as floats: `clip(round(x / scale) + zero_point, 0, quant_max)`; arguments broadcast."""
    return torch.clamp_(torch.round(x / scale).add_(zero_point), 0, quant_max)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """`(codes - zero_point) * scale`; arguments broadcast."""
    return (codes - zero_point) * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_max: int) -> torch.Tensor:
    """`x` rounded to its grid, without gradients of its own (GenQ, arXiv:2312.05272, eq. 1-2, bounds corrected)."""
    return quantize(x, scale, zero_point, quant_max).sub_(zero_point).mul_(scale)


class _LearnedStep(torch.autograd.Function):
    """Fake quantization whose step size is learned, with optional element-wise dropping.

    With `y` the output and `g` its gradient, the straight-through estimate gives `dx = g` where the value is inside
    the range or was not quantized, else 0, and `dscale = (sum(g * y) - sum(dx * x)) / scale`: inside the range this is
    `g * (round(x / scale) - x / scale)`, outside `g * low` or `g * high`, and nothing where the value was dropped.
    Masks are floats and the range is two numbers, because on CPUs element-wise work on booleans is not vectorised.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        low: float,
        high: float,
        keep: torch.Tensor | None,
        gradient_scale: float,
    ) -> torch.Tensor:
        ratio = x / scale
        y = torch.round(ratio).clamp_(low, high).mul_(scale)
        if keep is not None:
            torch.lerp(x, y, keep, out=y)
            ratio.mul_(keep)  # a dropped value becomes 0, which is inside
        ctx.save_for_backward(x, y, ratio, scale)
        ctx.range = (low - 0.5, high + 0.5)
        ctx.gradient_scale = gradient_scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (g,) = gradients
        x, y, ratio, scale = ctx.saved_tensors
        dx = torch.ops.aten.hardtanh_backward(g, ratio, *ctx.range)
        dscale = None
        if ctx.needs_input_grad[1]:
            if scale.numel() == 1:
                difference = (_inner(g, y) - _inner(dx, x)).reshape(scale.shape)
            else:
                difference = (g * y).sub_(dx * x).sum_to_size(scale.shape)
            dscale = difference / scale * ctx.gradient_scale
        return (dx if ctx.needs_input_grad[0] else None), dscale, None, None, None, None


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of products in fp32, in one pass where both lie in memory alike."""
    dense = a.is_contiguous() or a.is_contiguous(memory_format=torch.channels_last)
    if dense and a.stride() == b.stride() and a.dtype == b.dtype == torch.float32:
        flat = ((a.numel(),), (1,))
        return torch.dot(a.as_strided(*flat), b.as_strided(*flat))
    return (a * b).sum(dtype=torch.float32)


def learned_step_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    low: float,
    high: float,
    keep: torch.Tensor | None = None,
    gradient_scale: float = 1.0,
) -> torch.Tensor:
    """LSQ (arXiv:1902.08153, eq. 1-3), with QDrop's element-wise dropping (arXiv:2203.05740, eq. 6).

    Args:
        x: activations or weights of any shape.
        scale: learned step sizes, broadcastable to `x`.
        low: smallest multiple of the step, `-zero_point`; at most 0.
        high: largest multiple of the step, `quant_max - zero_point`; at least 0.
        keep: same shape as `x`, 1 where the quantized value is used and 0 elsewhere; empty: everywhere.
        gradient_scale: factor on the gradient of `scale` (LSQ: `1 / sqrt(x.numel() * high)`; Genie: 1).

    Returns:
        Fake-quantized values, same shape.
    """
    result: torch.Tensor = _LearnedStep.apply(x, scale, low, high, keep, gradient_scale)
    return result


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


def scaled_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """`x` itself, whose gradient is multiplied by `factor` (LSQ's gradient scale, arXiv:1902.08153, section 2.2)."""
    result: torch.Tensor = _ScaledGradient.apply(x, factor)
    return result


def round_straight_through(x: torch.Tensor) -> torch.Tensor:
    """`x` rounded to the nearest whole number, with the gradient of the identity.

    The sum below is exact: `round(x) - x` is, and it is what `x` lacks.
    """
    return x + (torch.round(x) - x).detach()


def clip_codes(codes: torch.Tensor, quant_max: int) -> torch.Tensor:
    """Whole numbers brought to the grid `0 .. quant_max`; those on it, its ends too, pass their gradient on.

    `torch.clamp` has no agreed gradient at its ends, where many codes lie.
    """
    on_grid = (codes >= 0) & (codes <= quant_max)
    return torch.where(on_grid, codes, codes.detach().clamp(0, quant_max))


def random_keep(like: torch.Tensor, probability: float, generator: torch.Generator | None) -> torch.Tensor:
    """A mask shaped and laid out as `like`, 1 with the given probability and else 0, in the dtype of `like`.

    The probability is rounded to 1/256, so that one 64-bit random number serves eight elements.
    """
    limit = round(probability * 256)
    if limit > 255:  # does not fit into the byte that is compared
        return torch.ones_like(like)
    count = like.numel()
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    # Compared as floats, which hold every byte exactly: on CPUs booleans are converted one by one.
    below = words.view(torch.uint8)[:count].to(like.dtype).lt_(limit)
    return below.as_strided(like.shape, torch.empty_like(like, device="meta").stride())


def rectified_sigmoid(logit: torch.Tensor) -> torch.Tensor:
    """Soft rounding `h(V) = clip(sigmoid(V) * 1.2 - 0.1, 0, 1)` (AdaRound, arXiv:2004.10568, eq. 23)."""
    return torch.clamp(torch.sigmoid(logit) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW, 0, 1)


def rectified_sigmoid_inverse(fraction: torch.Tensor) -> torch.Tensor:
    """Logits `V` with `h(V) = fraction`, for fractions in [0, 1)."""
    return -torch.log((STRETCH_HIGH - STRETCH_LOW) / (fraction - STRETCH_LOW) - 1)


def rounding_regularizer(soft: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
    """`sum(1 - |2h - 1|**beta)`: 0 once every rounding is decided (AdaRound, arXiv:2004.10568, eq. 24)."""
    return soft.numel() - (2 * soft - 1).abs().pow(beta).sum()


def undecided_share(soft: torch.Tensor) -> float:
    """Share of roundings with `0.02 < h < 0.98`, in 0..1."""
    return float(((soft > 0.02) & (soft < 0.98)).float().mean()) if soft.numel() else 0.0
