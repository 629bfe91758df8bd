"""Layers that rotate their input channels before they are quantized, by Hadamard matrices in blocks.

Rotated, a channel with large values is spread over all channels of its block, and what they share one scale with is no
longer an outlier. The matrix is orthogonal, so a weight that is rotated alike undoes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn

from synthquant.core.modules import get_module
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.input_schemes import RotationScheme
from synthquant.nn.layers import TRANSPOSED, QuantLayer, first_replaced, quantize_layer
from synthquant.nn.scheme import LayerScheme, QuantArgs
from synthquant.nn.weight_quantizers import WeightQuantizer

_H4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@lru_cache(maxsize=32)
def hadamard(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The regular Hadamard matrix `[size, size]` over `sqrt(size)`: orthogonal, symmetric, with equal sums of rows.

    The Kronecker power of the one of order 4 whose rows have three equal signs (ConvRot, arXiv:2512.03673, section
    3.2); its rows all sum to 1 here, so no channel gathers the mean of its block, as the first one of Sylvester's
    matrix does. Exact in every dtype.

    Args:
        size: a power of 4.
        dtype: of the entries, which are plus and minus `1 / sqrt(size)`.
        device: where it goes.
    """
    small, matrix = torch.tensor(_H4, dtype=torch.float64) / 2, torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(small, matrix)
    return matrix.to(device, dtype)


def rotation_block(channels: int, largest: int) -> int:
    """The largest power of 4 up to `largest` that divides `channels`; 1 if there is none, which rotates nothing."""
    block = 1
    while block * 4 <= largest and channels % (block * 4) == 0:
        block *= 4
    return block


def rotate(x: torch.Tensor, dim: int, block: int) -> torch.Tensor:
    """`x` with each `block` neighbours along a dimension rotated; its own inverse."""
    if block == 1:
        return x
    dim %= x.ndim
    matrix, shape = hadamard(block, x.dtype, x.device), x.shape
    if dim == x.ndim - 1:
        return (x.reshape(*shape[:-1], -1, block) @ matrix).reshape(shape)
    return (matrix @ x.reshape(*shape[:dim], shape[dim] // block, block, -1)).reshape(shape)


class RotatedLayer(QuantLayer):
    """A quantized layer that rotates what it reads; its weight was rotated when it was made."""

    block: int
    """Channels that are rotated together."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Rotate the input, quantize it, and do what the layer does."""
        args, kwargs = first_replaced(lambda x: rotate(x, channel_dim(self), self.block), args, kwargs)
        return super().forward(*args, **kwargs)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of the channels in what a layer reads."""
    return -1 if isinstance(layer, nn.Linear) else 1


def rotated_layer(
    layer: nn.Module,
    scheme: RotationScheme,
    weight_quantizer: WeightQuantizer | None,
    input_quantizer: ActivationQuantizer | None,
    output_quantizer: ActivationQuantizer | None,
) -> RotatedLayer:
    """Turn a layer into its quantized self, in place, with its input and weight rotated in blocks of input channels."""
    weight, groups = layer._parameters["weight"], 1
    assert weight is not None
    if isinstance(layer, nn.Linear):
        channels = layer.in_features
    else:
        convolution = cast(nn.Conv2d, layer)
        channels, groups = convolution.in_channels, convolution.groups
    block = rotation_block(channels // groups, scheme.block)
    rotated = rotate(weight.detach(), 0 if isinstance(layer, TRANSPOSED) else 1, block).contiguous()
    layer._parameters["weight"] = nn.Parameter(rotated, requires_grad=False)  # another module may share the old one
    quantized = cast(
        RotatedLayer, quantize_layer(layer, weight_quantizer, input_quantizer, output_quantizer, RotatedLayer)
    )
    quantized.block = block
    return quantized


def rotated_plan(network: nn.Module, plan: Mapping[str, LayerScheme]) -> dict[str, LayerScheme]:
    """What each layer gets where inputs are rotated: ranges at run time, symmetric, for each token or each sample.

    Kernels of several positions add up products of several tokens, whose scales must be equal.
    """
    found = {}
    for name, scheme in plan.items():
        args = scheme.input_activations
        if args is not None:
            single = all(size == 1 for size in getattr(get_module(network, name), "kernel_size", (1,)))
            update = {"kind": "dynamic", "symmetric": True, "strategy": "token" if single else "tensor"}
            args = QuantArgs.model_validate(args.model_dump() | update)
        found[name] = scheme.model_copy(update={"input_activations": args})
    return found
