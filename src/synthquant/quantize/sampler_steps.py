"""Samples of a denoiser at steps of its sampler: batches and orders in which all steps count alike.

Activations of a denoiser change along the steps of its sampler, and one static grid serves all of them (Q-Diffusion,
arXiv:2302.04304, section 3.2). So what a method looks at first, and what a unit learns from at a time, is to be of all
steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor


def in_turns(steps: Tensor) -> list[int]:
    """Positions of samples so that each step has its turn: the first sample of every step, the second of every one ...

    Args:
        steps: the step of each sample, whole numbers `[N]`.

    Returns:
        Each position once. Of the first `n` of them, every step has as many as any other, or one less, as long as it
        has samples left.
    """
    taken: Counter[int] = Counter()
    turns = []
    for position, step in enumerate(steps.tolist()):
        turns.append((taken[step], step, position))
        taken[step] += 1
    return [position for _, _, position in sorted(turns)]


def batches_of_steps(steps: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of exactly `size` indices in which every step has the same share, or one sample less.

    Samples of a step are drawn through shuffled epochs of its own. Which steps have a sample more in a batch, or any
    if there are more steps than samples in it, is drawn so that over many batches all have equal shares.

    Args:
        steps: the step of each sample, whole numbers `[N]`, on the generator's device.
        size: indices in a batch, at most `N` (all of them if there are fewer).
        generator: decides.
    """
    groups = [torch.nonzero(steps == step)[:, 0] for step in sorted(set(steps.tolist()))]
    streams = [_Shuffled(group, generator) for group in groups]
    turns = _Shuffled(torch.arange(len(groups), device=steps.device), generator)
    each, rest = divmod(min(size, len(steps)), len(groups))
    while True:
        more = Counter(turns.take(rest).tolist())
        yield torch.cat([stream.take(each + more[number]) for number, stream in enumerate(streams)])


class _Shuffled:
    """Indices in shuffled epochs, as many at a time as are asked for; none twice at a time while there are others."""

    def __init__(self, indices: Tensor, generator: torch.Generator) -> None:
        self._indices, self._generator = indices, generator
        self._rest = indices[:0]

    def take(self, count: int) -> Tensor:
        """The next ones."""
        taken, self._rest = self._rest[:count], self._rest[count:]
        while len(taken) < count:
            order = torch.randperm(len(self._indices), device=self._indices.device, generator=self._generator)
            epoch = self._indices[order]
            again = torch.isin(epoch, taken)
            epoch = torch.cat([epoch[~again], epoch[again]])
            more = count - len(taken)
            taken, self._rest = torch.cat([taken, epoch[:more]]), epoch[more:]
        return taken
