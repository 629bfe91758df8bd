"""Statistics of what enters a batch norm, and the distance to what the batch norm remembers of its training data.

Each measurement is one autograd node with one fused backward pass. For a channel with inputs `x`, mean `m` and standard
deviation `s` over `n` values, and gradients `gm`, `gs` that arrive for `m` and `s`, the gradient for `x` is

    gm / n + gs * (x - m) / ((n - 1) * s)

which is an affine map of `x` per channel. Behind a frozen batch norm `y = x * scale + shift` the gradient of `y` adds
`gy * scale`, so that measuring costs hardly more memory traffic than the layer alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TARGET_EPSILON = 1e-6
"""Added to the running variance before its square root is the target (both reference codes do so)."""


def measure(inputs: Tensor, *, per_image: bool = False, epsilon: float = 0.0) -> Tensor:
    """Mean and standard deviation of each channel, in float32.

    `inputs` is `[B, C, ...]`; the result `[2, C]` over the whole batch, or `[2, B, C]` per image. The deviation is
    `sqrt(variance + epsilon)` with the unbiased variance, which is 0 for a single value. A constant channel gets no
    gradient through its deviation.
    """
    statistics: Tensor = _Measure.apply(inputs, per_image, epsilon)
    return statistics


def normalize_and_measure(
    inputs: Tensor, scale: Tensor, shift: Tensor, *, per_image: bool = False, epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return `inputs * scale + shift` (`scale`, `shift`: float32 `[C]`, constants) and `measure(inputs)`."""
    outputs, statistics = _NormalizeAndMeasure.apply(inputs, scale, shift, per_image, epsilon)
    return outputs, statistics


def statistics_loss(statistics: Tensor, targets: Tensor, weights: Tensor, slack: Tensor | None = None) -> Tensor:
    """Weighted squared distance of means and deviations to their targets, summed over channels; a scalar.

    `statistics` is `[2, C]`, or `[2, B, C]`, where the sum is averaged over the B images. `targets` is `[2, C]`,
    `weights` is `[C]`, or `[B, C]` for each image its own. With a `slack` `[2, C]` gaps count only by what they are
    wider than it: `max(|gap| - slack, 0)^2`.
    """
    if statistics.ndim == 3:
        gaps = statistics - targets[:, None]
        if slack is not None:
            gaps = (gaps.abs() - slack[:, None]).clamp_min(0)
        return (gaps.square() * weights).sum() / statistics.shape[1]
    if slack is not None:
        return ((statistics - targets).abs() - slack).clamp_min(0).square().mul(weights).sum()
    return ((statistics - targets).square() * weights).sum()


def image_loss(images: Tensor, *, epsilon: float = 0.0) -> Tensor:
    """Squared distance of each normalised image's channel means to 0 and deviations to 1, averaged over images."""
    statistics = measure(images, per_image=True, epsilon=epsilon)
    targets = torch.stack([torch.zeros_like(statistics[0, 0]), torch.ones_like(statistics[0, 0])])
    return statistics_loss(statistics, targets, torch.ones_like(targets[0]))


def moments(inputs: Tensor, *, per_image: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel in float32: `[C]` over the batch or `[B, C]` per image."""
    if per_image:
        values = inputs.float()
        if values.ndim == 2:
            return values.clone(), torch.zeros_like(values)
        over = tuple(range(2, values.ndim))
        mean = values.mean(over, keepdim=True)
        # Two passes: exact like Welford's, and several times faster than torch.var_mean on a CPU.
        return mean.flatten(1), (values - mean).square_().mean(over)
    if inputs.device.type == "cpu":
        # The kernel that training-mode batch norm runs; it leaves no trace without running statistics.
        mean, variance = torch.batch_norm_update_stats(inputs.float(), None, None, 0.0)
        return mean, variance
    variance, mean = torch.var_mean(inputs.float(), [0, *range(2, inputs.ndim)], correction=0)
    return mean, variance


class _Counts:
    """How many values a statistic is taken over, and how many degrees of freedom its variance has."""

    def __init__(self, inputs: Tensor, per_image: bool) -> None:
        channels = inputs.shape[1] * (inputs.shape[0] if per_image else 1)
        self.values = inputs.numel() // max(channels, 1)
        self.free = max(self.values - 1, 1)


def _statistics(inputs: Tensor, per_image: bool, epsilon: float) -> Tensor:
    counts = _Counts(inputs, per_image)
    mean, variance = moments(inputs, per_image=per_image)
    return torch.stack([mean, (variance * (counts.values / counts.free) + epsilon).sqrt_()])


def _gradient_map(inputs: Tensor, statistics: Tensor, gradient: Tensor, per_image: bool) -> tuple[Tensor, Tensor]:
    """Factor and offset, ready to broadcast: the statistics' gradient for `inputs` is `inputs * factor + offset`."""
    counts = _Counts(inputs, per_image)
    mean, deviation = statistics
    factor = (gradient[1] / (deviation * counts.free)).masked_fill_(deviation == 0, 0.0)
    offset = gradient[0] / counts.values - factor * mean
    return _spread(factor, inputs), _spread(offset, inputs)


def _spread(channels: Tensor, inputs: Tensor) -> Tensor:
    """View `[C]` or `[B, C]` so that it broadcasts over `inputs` `[B, C, ...]`."""
    rows = channels.shape[0] if channels.ndim == 2 else 1
    return channels.view(rows, -1, *[1] * (inputs.ndim - 2))


class _Measure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, per_image: bool, epsilon: float) -> Tensor:
        statistics = _statistics(inputs, per_image, epsilon)
        ctx.save_for_backward(inputs, statistics)
        ctx.per_image = per_image
        return statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        inputs, statistics = ctx.saved_tensors
        factor, offset = _gradient_map(inputs, statistics, gradients[0], ctx.per_image)
        return torch.addcmul(offset, inputs, factor).to(inputs.dtype), None, None


class _NormalizeAndMeasure(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, scale: Tensor, shift: Tensor, per_image: bool, epsilon: float
    ) -> tuple[Tensor, Tensor]:
        statistics = _statistics(inputs, per_image, epsilon)
        ctx.save_for_backward(inputs, statistics, scale)
        ctx.per_image = per_image
        ctx.set_materialize_grads(False)  # nothing reads the output of the last batch norm
        outputs = torch.addcmul(_spread(shift, inputs), inputs, _spread(scale, inputs)).to(inputs.dtype)
        return outputs, statistics

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        inputs, statistics, scale = ctx.saved_tensors
        of_outputs, of_statistics = gradients
        total: Tensor | None = None
        if of_statistics is not None:
            factor, offset = _gradient_map(inputs, statistics, of_statistics, ctx.per_image)
            total = torch.addcmul(offset, inputs, factor)
        if of_outputs is not None:
            by_scale = _spread(scale, inputs)
            total = of_outputs * by_scale if total is None else total.addcmul_(of_outputs, by_scale)
        return None if total is None else total.to(inputs.dtype), None, None, None, None
