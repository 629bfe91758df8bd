"""A distance to the batch norms whose layers are weighted by what tells plain images from spoilt ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field, field_validator
from torch import Tensor

from synthquant.core.errors import DataError
from synthquant.core.modules import eval_mode
from synthquant.data.preprocess import input_batches
from synthquant.methods import SELECTORS
from synthquant.select.batch_norm import (
    BatchNormFilter,
    BatchNormProbe,
    BatchNorms,
    gap_norms,
    mean_sensitivity,
    totals,
)
from synthquant.select.corruptions import CORRUPTIONS, Corruption, corrupt

if TYPE_CHECKING:
    from synthquant.methods import Candidates

_STEPS = 2000
# Balanced accuracy on the sets that were learned from below which the weights say little.
_POOR = 0.9


@dataclass(frozen=True)
class LearnedDistance:
    """The batch norms of a network and how much each of their gaps tells."""

    norms: BatchNorms
    """What the columns of the table belong to."""
    weights: Tensor
    """float64 `[2L]`, at least 0, in the order of `gap_norms`: log odds that a set is spoilt, for each unit of gap."""
    accuracy: float
    """Share of the sets learned from that are told apart (0..1), plain and spoilt ones counting alike."""


@SELECTORS.register("bn_learned")
class LearnedBatchNormDistance(BatchNormFilter):
    """Parameterised batch-norm filter of StableQ, the first version of GenQ (arXiv:2312.05272v1): our reconstruction.

    StableQ weights batch-norm statistics by parameters that are trained to tell plain images from deliberately
    corrupted ones; neither their form nor the corruptions nor the loss are published. Here `sample` images are
    corrupted in each way, plain and corrupted images are put into sets of `set_size`, and non-negative weights `a`, `b`
    of the gaps `D = sum_l (a_l |mean - mean_l| + b_l |variance - variance_l|)` are fitted by logistic regression.
    Images are ranked as `bn_sensitivity` does: what leaves `D` smaller when it is left out goes first. GenQ dropped
    this filter for `bn_sensitivity`. Corrupted images are run besides the one pass over the pool.
    """

    sample: int = Field(default=512, ge=4)
    """Images that are corrupted to learn from, or all if there are fewer; each costs one forward pass a corruption."""

    set_size: int = Field(default=32, ge=2)
    """Images in a set, about."""

    partitions: int = Field(default=8, ge=1)
    """Random partitions that a score is averaged over."""

    corruptions: tuple[Corruption, ...] = CORRUPTIONS
    """In which ways images are corrupted: `noise`, `blur`, `color` (a negative with other colours), `shuffle`."""

    penalty: float = Field(default=0.01, gt=0)
    """Weight of the squared weights in the loss, with gaps scaled to variance 1."""

    @field_validator("corruptions")
    @classmethod
    def _check_corruptions(cls, corruptions: tuple[Corruption, ...]) -> tuple[Corruption, ...]:
        if not corruptions:
            raise ValueError("name at least one corruption")
        return corruptions

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the sensitivities of a distance that is learned from the candidates; raises as `learn`."""
        return self.sensitivities(candidates, self.learn(candidates))

    def learn(self, candidates: Candidates) -> LearnedDistance:
        """Learn the weights. Raises `DataError` for fewer than 4 images: two sets of two."""
        table, chosen, progress = candidates.table, candidates.chosen, candidates.progress
        norms: BatchNorms = candidates.probe.norms
        if len(chosen) < 4:
            raise DataError(f"weights are learned from two sets of two images at least; there are {len(chosen)}")
        generator = candidates.rng.generator("sample")
        places = torch.randperm(len(chosen), generator=generator)[: self.sample].sort().values
        members = torch.randperm(len(places), generator=generator).tensor_split(max(2, len(places) // self.set_size))
        plain = torch.stack([self._gaps(*totals(table[chosen[places[part]]]), part, norms) for part in members])
        spoilt = self._spoilt(replace(candidates, images=candidates.images.subset(places)), members)
        weights, accuracy = learn_weights(plain, spoilt, self.penalty)
        told = f"{100 * accuracy:.0f}% of the sets it was learned from"
        if accuracy < _POOR:
            progress.warn(f"bn_learned tells plain from corrupted images in {told} only; its choice says little")
        else:
            progress.say(f"bn_learned tells plain from corrupted images in {told}")
        return LearnedDistance(norms, weights, accuracy)

    def sensitivities(self, candidates: Candidates, distance: LearnedDistance) -> Tensor:
        """Return the sensitivities of a learned distance among the candidates: changes of log odds, float64 `[n]`."""
        return mean_sensitivity(
            candidates, distance.norms, self.spread,
            set_size=self.set_size, partitions=self.partitions, weights=distance.weights,
        )  # fmt: skip

    def _gaps(self, sums: Tensor, squares: Tensor, part: Tensor, norms: BatchNorms) -> Tensor:
        return gap_norms(sums, squares, len(part), norms, self.spread)

    @torch.no_grad()
    def _spoilt(self, sample: Candidates, members: Sequence[Tensor]) -> Tensor:
        """Gaps of the sets of sampled images, each corrupted in each way, float64 `[corruptions * sets, 2L]`."""
        images, model = sample.images, sample.model
        member = torch.empty(len(images), dtype=torch.int64)
        for index, part in enumerate(members):
            member[part] = index
        probe = BatchNormProbe(model.module)
        sums: dict[Corruption, Tensor] = {}
        kinds = self.corruptions
        with eval_mode(model.module), sample.progress.bar("look at corrupted images", len(images) * len(kinds)) as bar:
            for batch in input_batches(images, model.preprocess, sample.batch_size):
                pixels = model.preprocess.pixels(batch.inputs)
                for kind in kinds:
                    spoilt = [
                        corrupt(image, kind, sample.rng.generator(f"{kind} of image {place}"))
                        for image, place in zip(pixels, batch.indices, strict=True)
                    ]
                    inputs = model.preprocess.normalize(torch.stack(spoilt)).to(model.device)
                    with probe.watch(len(inputs)):
                        logits = model.logits(inputs)
                    rows = probe.rows(logits).double().cpu()
                    total = sums.setdefault(kind, torch.zeros(len(members), rows.shape[1], dtype=torch.float64))
                    total.index_add_(0, member[batch.indices], rows)
                    bar.advance(len(inputs))
        gaps = []
        for kind in kinds:
            firsts, squares = sums[kind].chunk(2, 1)
            gaps += [
                self._gaps(first, square, part, probe.norms)
                for first, square, part in zip(firsts, squares, members, strict=True)
            ]
        return torch.stack(gaps)


def learn_weights(plain: Tensor, spoilt: Tensor, penalty: float) -> tuple[Tensor, float]:
    """Fit non-negative weights that tell sets apart, by logistic regression.

    Minimises `mean log(1 + exp(-y (x w + c))) + penalty / 2 |w|^2` over `w >= 0` and `c`, with both classes weighing
    alike and `x` the gaps, centred and scaled to variance 1, by accelerated projected gradient descent.

    Args:
        plain: float64 `[n, F]`, gaps of plain sets.
        spoilt: float64 `[m, F]`, gaps of corrupted sets.
        penalty: of the squared weights of scaled gaps.

    Returns:
        The weights of the gaps as they came, float64 `[F]`, and the balanced accuracy (0..1) on these sets.
    """
    gaps = torch.cat([plain, spoilt])
    sign = torch.cat([torch.full((len(plain),), -1.0), torch.full((len(spoilt),), 1.0)]).double()
    share = torch.where(sign < 0, 0.5 / len(plain), 0.5 / len(spoilt))
    scale = gaps.std(0, correction=0)
    scaled = torch.where(scale > 0, (gaps - gaps.mean(0)) / scale, 0.0)
    design = torch.cat([scaled, torch.ones(len(gaps), 1, dtype=torch.float64)], 1)
    decay = torch.full((design.shape[1],), penalty, dtype=torch.float64)
    decay[-1] = 0.0
    rate = 1 / (0.25 * float(torch.linalg.matrix_norm(design * share.sqrt()[:, None], ord=2)) ** 2 + penalty)
    parameters = ahead = torch.zeros(design.shape[1], dtype=torch.float64)
    momentum = 1.0
    for _ in range(_STEPS):
        slope = design.T @ (-sign * share * torch.sigmoid(-sign * (design @ ahead))) + decay * ahead
        moved = ahead - rate * slope
        moved[:-1].clamp_(min=0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = moved + (momentum - 1) / following * (moved - parameters)
        parameters, momentum = moved, following
    right = (sign * (design @ parameters) > 0).double()
    weights = torch.where(scale > 0, parameters[:-1] / scale, 0.0)
    return weights, float((right * share).sum())
