"""The energy score: how much a network's logits look like those of its training data."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor

from synthquant.methods import SELECTORS
from synthquant.select.filter import Filter

if TYPE_CHECKING:
    from synthquant.methods import Candidates
    from synthquant.models.float_model import FloatModel


def energy_score(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return `-T logsumexp_k(f_k / T)`, float32 `[B]`, of logits `[B, classes]`: low for what the network knows.

    Liu et al. 2020, Energy-based Out-of-distribution Detection (arXiv:2010.03759), Eq. 3.
    """
    return -temperature * torch.logsumexp(logits.float() / temperature, 1)


@SELECTORS.register("energy")
class Energy(Filter):
    """Energy filtering of GenQ (arXiv:2312.05272, Eq. 5), by the score of arXiv:2010.03759.

    Keeps the images of the lowest energy `-T logsumexp_k(f_k / T)` of the logits `f`. GenQ's Eq. 5 prints
    `-T sum_k exp(-f_k / T)`, without the logarithm and with the other sign, which ranks by the most negative logit; the
    score it cites is the one computed here. GenQ does not give its temperature. A rank over all classes prefers classes
    with large logits: `per_class` avoids that.
    """

    temperature: float = Field(default=1.0, gt=0)
    """`T`; larger ones let all logits count, smaller ones the largest only."""

    def supports(self, model: FloatModel) -> bool:
        """Every classifier has logits."""
        return True

    def probe(self, model: FloatModel) -> EnergyProbe:
        """Return what turns logits into energies."""
        return EnergyProbe(self.temperature)

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the energies; they depend on the image alone."""
        return candidates.table[candidates.chosen, 0].double()


class EnergyProbe:
    """Rows of one number: the energy of the logits."""

    def __init__(self, temperature: float) -> None:
        self.name = f"energy at temperature {temperature}"
        self._temperature = temperature

    def watch(self, count: int) -> AbstractContextManager[object]:
        """Nothing inside the network is looked at."""
        return nullcontext()

    def rows(self, logits: Tensor) -> Tensor:
        """Return the energies `[B, 1]`."""
        return energy_score(logits, self._temperature)[:, None]
