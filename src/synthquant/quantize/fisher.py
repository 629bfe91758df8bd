"""How much the network's answer depends on a unit's output: BRECQ's weighting of the reconstruction error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from synthquant.core.modules import hooked
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.unit_files import Parts


def fisher_weights(gradient: torch.Tensor) -> torch.Tensor:
    """Weights `w` of a unit's error from the absolute gradients `[B, ...]` of each image, of the same shape.

    `w` is 1 and the gradient's share of its root mean square over the image, divided so that the mean of `w**2` over
    the image is 1. An error weighted by `w**2` is then as large as a plain one, whatever the scale of the gradients:
    the weighting has its effect, the regulariser keeps its own, and no image outweighs the others because the network
    is already wrong about it.
    """
    size = _root_mean_square(gradient)
    weights = 1 + gradient / size.where(size > 0, 1)
    return weights / _root_mean_square(weights)


def _root_mean_square(tensor: torch.Tensor) -> torch.Tensor:
    """Of each image, `[B, 1, ...]`; in double precision, because squares of small gradients vanish."""
    return tensor.double().square().mean(tuple(range(1, tensor.ndim)), keepdim=True).sqrt().to(tensor.dtype)


def output_gradient(
    model: QuantModel,
    unit: nn.Module,
    position: int,
    later: Sequence[Parts],
    images: torch.Tensor,
    run_from_unit: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Absolute gradient of the output error with respect to a unit's output (BRECQ, arXiv:2102.05426, eq. 10).

    The error is `KL(float softmax || quantized softmax)` of each image, with the network quantized up to and including
    the unit: no image's gradient depends on the others. This is the one place that runs the rest of the network for
    every unit.

    Args:
        model: the network.
        unit: the unit's module.
        position: which of the leaves that the unit returns.
        later: layers and quantizers of the units behind it, which stay in floating point.
        images: `[B, 3, H, W]`, as the network reads them.
        run_from_unit: runs the network on `images` from the unit on and returns logits `[B, classes]`.

    Returns:
        Of the shape of that leaf.
    """
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, args: Any, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        caught.append(leaves[position].detach().requires_grad_())
        leaves[position] = caught[-1].clone()
        return pytree.tree_unflatten(leaves, spec)

    with torch.no_grad(), model.mode(weights=False, activations=False):
        wanted = F.log_softmax(model(images).double(), 1)
    with hooked([(unit, catch)]), in_float(later), torch.enable_grad():
        # In double precision: the gradient is the difference of two probabilities that are nearly the same.
        found = F.log_softmax(run_from_unit().double(), 1)
        error = F.kl_div(found, wanted, reduction="sum", log_target=True)
        leaf = caught.pop()
        # A leaf that nothing behind the unit reads has no gradient: its error does not matter.
        error = error + 0 * leaf.sum()
        (gradient,) = torch.autograd.grad(error, leaf)
    return gradient.abs()


@contextmanager
def in_float(parts: Sequence[Parts]) -> Iterator[None]:
    """Leave layers and quantizers in floating point for a while."""
    layers = [(layer, layer.weights_enabled) for part, _ in parts for layer in part]
    quantizers = [(quantizer, quantizer.enabled) for _, part in parts for quantizer in part]
    try:
        for layer, _ in layers:
            layer.weights_enabled = False
        for quantizer, _ in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for layer, enabled in layers:
            layer.weights_enabled = enabled
        for quantizer, enabled in quantizers:
            quantizer.enabled = enabled
