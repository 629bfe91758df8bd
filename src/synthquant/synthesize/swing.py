"""Swing convolution of Genie (arXiv:2212.04780): a strided convolution that reads from a random offset.

With stride 2 some pixels meet fewer kernel positions than others, and inversion leaves a checkerboard in the images.
Here the input is reflect-padded by one pixel, cropped back to its size at an offset (dy, dx) in {0, 1, 2}^2 and then
convolved: offset (1, 1) is the plain convolution. Pad and crop are one gather with indices computed on the device, so
that drawing a new offset needs no synchronisation and the step can be recorded in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

OFFSETS = 3
"""Offsets per axis: 0, 1 and 2; 1 is the plain convolution."""


class SwingOffsets:
    """The offsets of all strided convolutions of a network, drawn together once per iteration.

    It hooks itself before every `nn.Conv2d` of `network` whose stride is not 1; give it a private copy. Each
    convolution has its own offset for the whole batch; one that is called several times per iteration reads from the
    same offset.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        strided = [module for module in convolutions if set(module.stride) != {1}]
        self.offsets = torch.ones(len(strided), 2, dtype=torch.int64, device=device)
        """`[convolutions, 2]`, rows and columns, in the order of `network.modules()`."""
        for index, module in enumerate(strided):
            module.register_forward_pre_hook(self._swing(index))

    def draw(self, generator: torch.Generator) -> None:
        """Draw new offsets from a generator on the network's device."""
        torch.randint(0, OFFSETS, self.offsets.shape, generator=generator, out=self.offsets)

    def _swing(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            del module
            return swing(inputs[0], self.offsets[index]), *inputs[1:]

        return hook


def swing(inputs: Tensor, offset: Tensor) -> Tensor:
    """Reflect-pad `inputs` `[B, C, H, W]` by 1 and crop to `[B, C, H, W]` at `offset` (int64 `[2]`, values 0..2).

    An axis of length 1 cannot be reflected and stays as it is.
    """
    outputs: Tensor = _Swing.apply(inputs, offset)
    return outputs


class _Swing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(offset)
        batch, channels, height, width = inputs.shape
        rows, columns = _reflected(height, offset[0]), _reflected(width, offset[1])
        pixels = inputs.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        chosen = pixels.index_select(1, (rows[:, None] * width + columns).flatten())
        return chosen.view(batch, height, width, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (offset,) = ctx.saved_tensors
        pixels = gradients[0].permute(0, 2, 3, 1)
        pixels = _return_to_source(pixels, offset[0], dim=1)
        return _return_to_source(pixels, offset[1], dim=2).permute(0, 3, 1, 2), None


def _reflected(size: int, offset: Tensor) -> Tensor:
    """Where each of `size` positions reads from after padding and cropping: int64 `[size]`."""
    if size == 1:
        return torch.zeros(1, dtype=torch.int64, device=offset.device)
    position = (torch.arange(size, device=offset.device) + (offset - 1)).abs_()
    return torch.where(position < size, position, 2 * (size - 1) - position)


def _return_to_source(gradient: Tensor, offset: Tensor, dim: int) -> Tensor:
    """Transpose of the gather along one axis, again as a gather (scattering would need atomics on a GPU).

    A shift by one leaves one position that nothing read, and one that was read twice: by its neighbour on either side.
    """
    size = gradient.shape[dim]
    if size == 1:
        return gradient
    shift = offset - 1
    moved = shift.abs().to(gradient.dtype)
    forward = (shift > 0).to(shift.dtype).view(1)
    # By arithmetic: torch.where of two Python numbers would copy them to the device, which waits.
    edge = forward * (size - 1)
    unread = (size - 1) - edge
    twice = 1 + forward * (size - 3)
    source = (torch.arange(size, device=offset.device) - shift).clamp_(0, size - 1)
    result = gradient.index_select(dim, source)
    result.index_copy_(dim, unread, result.index_select(dim, unread) * (1 - moved))
    return result.index_add_(dim, twice, gradient.index_select(dim, edge) * moved)
