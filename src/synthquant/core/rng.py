"""One seed, and a named random generator for every purpose.

Two purposes never share a stream, so adding a draw in one place does not shift the numbers of another,
and a run that resumes in the middle draws what an uninterrupted run would have drawn.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from synthquant.core.errors import InputError
from synthquant.core.settings import LARGEST_INT


@dataclass(frozen=True)
class Rng:
    """A seed and the path of purposes that led here. Never touches the global random state."""

    seed: int
    """The run's seed."""
    path: tuple[str, ...] = ()
    """Purposes from the outermost to the innermost."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_INT:
            raise InputError(f"seed {self.seed} is not within 0 and {LARGEST_INT}; choose a smaller one")

    def child(self, purpose: str) -> Rng:
        """Return the random source of a part of the work, independent of all its siblings."""
        return Rng(self.seed, (*self.path, purpose))

    def seed_for(self, purpose: str) -> int:
        """Return 63 bits that depend on the seed, the path and the purpose only."""
        # Lengths are hashed too: without them ("a", "b/c") and ("a/b", "c") could collide.
        text = "".join(f"{len(part)}:{part}" for part in (str(self.seed), *self.path, purpose))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def generator(self, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
        """Return a fresh generator on `device`; the same purpose gives the same stream each time."""
        generator = torch.Generator(device=device)
        generator.manual_seed(self.seed_for(purpose))
        return generator
