"""How much the network's output depends on a unit's output: BRECQ's weighting of the reconstruction error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from synthquant.core.modules import hooked
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.layers import QuantLayer
from synthquant.nn.quant_model import QuantModel

Parts = tuple[list[QuantLayer], list[ActivationQuantizer]]


def fisher_weight(
    model: QuantModel,
    unit: nn.Module,
    later: Sequence[Parts],
    images: torch.Tensor,
    run_from_unit: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """`|gradient| + 1` of the output error with respect to a unit's (first) output (BRECQ, arXiv:2102.05426).

    The gradient is that of `KL(float softmax || quantized softmax)`, batch mean, with the network quantized up to
    and including the unit. This is the one place that runs the rest of the network for every unit.

    Args:
        model: the network.
        unit: the unit's module.
        later: layers and quantizers of the units behind it, which stay in floating point.
        images: `[B, 3, H, W]`, as the network reads them.
        run_from_unit: runs the network on `images` from the unit on and returns logits `[B, classes]`.

    Returns:
        Of the shape of the unit's first output tensor.
    """
    caught: list[torch.Tensor] = []

    def catch(_: nn.Module, args: object, output: object) -> object:
        leaves, spec = pytree.tree_flatten(output)
        caught.append(leaves[0].detach().requires_grad_())
        return pytree.tree_unflatten([caught[-1].clone(), *leaves[1:]], spec)

    with torch.no_grad(), model.mode(weights=False, activations=False):
        wanted = F.softmax(model(images), 1)
    with hooked([(unit, catch)]), _in_float(later), torch.enable_grad():
        error = F.kl_div(F.log_softmax(run_from_unit(), 1), wanted, reduction="batchmean")
        (gradient,) = torch.autograd.grad(error, caught.pop())
    return gradient.abs() + 1


@contextmanager
def _in_float(parts: Sequence[Parts]) -> Iterator[None]:
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
