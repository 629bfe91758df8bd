"""How much the network's answer depends on a unit's output: BRECQ's weighting of the reconstruction error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from synthquant.core.modules import hooked
from synthquant.models.float_model import Task
from synthquant.models.signature import Inputs, named_outputs
from synthquant.nn.layers import switched
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
    inputs: Inputs,
    run_from_unit: Callable[[], Any],
) -> torch.Tensor:
    """Absolute gradient of the output error with respect to a unit's output (BRECQ, arXiv:2102.05426, eq. 10).

    The error is the Kullback-Leibler divergence of what the float network says of each sample to what it says with
    everything up to and including the unit quantized (`divergence`): no sample's gradient depends on the others. This
    is the one place that runs the rest of the network for every unit.

    Args:
        model: the network.
        unit: the unit's module.
        position: which of the leaves that the unit returns.
        later: layers and quantizers of the units behind it, which stay in floating point.
        inputs: what the network is given.
        run_from_unit: runs the network on `inputs` from the unit on and returns what it gives.

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
        wanted = inputs.call(model)
    with hooked([(unit, catch)]), in_float(later), torch.enable_grad():
        error = divergence(wanted, run_from_unit(), model.float_model.task)
        leaf = caught.pop()
        # A leaf that nothing behind the unit reads has no gradient: its error does not matter.
        error = error + 0 * leaf.sum()
        (gradient,) = torch.autograd.grad(error, leaf)
    return gradient.abs()


def divergence(wanted: Any, found: Any, task: Task) -> torch.Tensor:
    """`KL(wanted || found)` of two answers of a network, summed over samples, float64; differentiable in `found`.

    Logits `[B, classes]` of a classifier stand for the distribution of their softmax. The values of any other network
    stand for means of normal distributions of variance 1, whose divergence is half the squared distance, summed over
    all floating-point tensors of the answer.
    """
    # In double precision: the gradient is the difference of two answers that are nearly the same.
    if task == "classify":
        one, other = F.log_softmax(found.double(), 1), F.log_softmax(wanted.double(), 1)
        return F.kl_div(one, other, reduction="sum", log_target=True)
    tensors, others = named_outputs(wanted), named_outputs(found)
    return torch.stack([(others[name] - tensor).double().square().sum() / 2 for name, tensor in tensors.items()]).sum()


def in_float(parts: Sequence[Parts]) -> AbstractContextManager[None]:
    """Leave layers and quantizers in floating point for a while."""
    layers = [layer for part, _ in parts for layer in part]
    quantizers = [quantizer for _, part in parts for quantizer in part]
    return switched(layers, quantizers, weights=False, activations=False)
