"""A batch in pieces: the loss of a whole batch with the activations of only some of its images in memory.

A frozen network treats each image by itself; only the statistics at its batch norms join them. So the network runs
piece by piece, the statistics of the pieces give those of the batch, its loss gives their gradients, and these go back
through each piece. Activations of pieces that do not fit into memory are dropped after the first pass and computed once
more (Chen et al., arXiv:1604.06174). Which ones are dropped changes the time and not a bit of the result: a piece is
computed in the same way both times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synthquant.core.formatting import size as size_of
from synthquant.core.free_memory import GIB, free_memory

if TYPE_CHECKING:
    from synthquant.core.progress import Progress

# Activations of a batch that runs as one piece, and of one piece of a larger batch. A piece must not depend on the free
# memory, as sums over other pieces are rounded otherwise. A GPU needs larger ones to be busy, and has faster memory.
_WHOLE = {"cpu": 2 * GIB, "other": 8 * GIB}
_PIECE = {"cpu": 1 * GIB, "other": 4 * GIB}
# Share of the free memory that is planned with; the rest is for what cannot be foreseen.
_SPENT = 0.75
# Gradients of the largest activation that exist at a time, beside the activations.
_GRADIENTS = 3


@dataclass(frozen=True)
class Pieces:
    """How a batch is divided."""

    size: int = sys.maxsize
    """Images in a piece; the last one may have fewer."""
    kept: int = 1
    """Pieces, the last ones of a batch, whose activations stay in memory from one pass to the other."""


@dataclass(frozen=True)
class Need:
    """Memory that a forward and backward pass takes."""

    fixed: int
    """Bytes whatever the number of images."""
    per_image: int
    """Bytes for each image."""

    def of(self, images: int) -> int:
        """Bytes for so many images."""
        return self.fixed + images * self.per_image


def need_of(run: Callable[[], Tensor], images: int, *, fixed: int, own: Iterable[Tensor]) -> Need:
    """Return what a backward pass through `run()` needs, found by counting what it saves.

    Args:
        run: a forward pass of `images` images that records gradients.
        images: how many.
        fixed: bytes that weights, their gradients and their optimiser take.
        own: weights and the like, which exist once and are not counted again.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, int] = {}
    kept = []  # so that no memory is used a second time, and counted once

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        run()
    largest = max(saved.values(), default=0)
    return Need(fixed, (sum(saved.values()) + _GRADIENTS * largest) // images)


def divided(batch: int, network: Need, beside: Need, device: torch.device, progress: Progress) -> Pieces:
    """Return how a batch of so many images is divided, and say so if it is.

    The size of a piece follows from the network alone, the number of those kept from the free memory.

    Args:
        batch: images.
        network: what the inverted network needs.
        beside: what makes the images, for the whole batch.
        device: where all this is.
        progress: told what was chosen, and warned if it will not fit.
    """
    size = piece_size(batch, network, device)
    count = -(-batch // size)
    free = free_memory(device)
    room = int(_SPENT * free) - beside.of(batch) - network.fixed
    kept = min(count, max(1, room // (size * network.per_image)))
    least = beside.of(batch) + network.of(size)
    if least > free:
        progress.warn(
            f"a batch of {batch} images takes {size_of(least)} of memory at least and {size_of(free)} are free;"
            " lower batch_size"
        )
    elif count > 1:
        again = f", {count - kept} of them computed twice" if kept < count else ""
        progress.say(
            f"batches of {batch} images run in {count} pieces of {size}{again}: their activations take"
            f" {size_of(network.of(batch))}, what makes the images {size_of(beside.of(batch))}, and {size_of(free)} are"
            " free"
        )
    return Pieces(size, kept)


def piece_size(batch: int, network: Need, device: torch.device) -> int:
    """Return how many images of a batch run at once; it follows from the network alone."""
    kind = _kind(device)
    if network.of(batch) <= _WHOLE[kind]:
        return batch
    return min(batch, _power_of_two(_PIECE[kind] // network.per_image))


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "other"


def _power_of_two(most: int) -> int:
    """The largest one that is not above `most`; at least 1."""
    return 1 << max(0, most.bit_length() - 1)


def joined(statistics: Tensor, counts: Tensor, epsilon: float) -> Tensor:
    """Return mean and deviation of each channel over all pieces, `[2, C]`, as `losses.measure` gives them for a batch.

    Args:
        statistics: those of the pieces, `[P, 2, C]`.
        counts: values that each was taken over, `[P, C]`.
        epsilon: what `measure` added to variances.
    """
    means, deviations = statistics.unbind(1)
    total = counts.sum(0)
    shares = counts / total
    mean = (shares * means).sum(0)
    within = (deviations.square() - epsilon) * ((counts - 1) / counts)
    variance = (shares * (within + (means - mean).square())).sum(0) * (total / (total - 1).clamp_min(1)) + epsilon
    constant = variance <= 0  # no gradient, as in `measure`
    return torch.stack([mean, variance.masked_fill(constant, 1).sqrt().masked_fill(constant, 0)])
