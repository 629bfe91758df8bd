"""How far a set of images is from the statistics a network's batch norms remember, and what each image adds to that.

In eval mode the activations of one image do not depend on the others, so the statistics of any set follow from two sums
per image and channel: one forward pass over the pool is enough for every subset of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from synthquant.core.errors import DataError, UnsupportedModelError
from synthquant.core.modules import hooked
from synthquant.methods import SELECTORS
from synthquant.models.batch_norm import batch_norm_layers, batch_norm_targets
from synthquant.select.filter import Filter, unfit

if TYPE_CHECKING:
    from synthquant.methods import Candidates
    from synthquant.models.float_model import FloatModel

Spread = Literal["variance", "std"]
"""Which of the two is compared beside the mean."""

# Images left out at a time: what is held in float64 is this many rows.
_LEFT_OUT_TOGETHER = 32


@dataclass(frozen=True)
class BatchNorms:
    """The batch norms of a network, their channels one after another in the order of the module tree."""

    names: tuple[str, ...]
    """Module names."""
    channels: tuple[int, ...]
    """Channels of each, `C` in all."""
    values: Tensor
    """float64 `[C]`, how many values of each channel one image gives (height times width)."""
    variance: Tensor
    """float64 `[C]`, running variances."""


class BatchNormProbe:
    """Rows of two sums per channel: of the inputs of every batch norm minus its running mean, and of their squares.

    Centring by the running mean makes the first sum the gap of means itself, and keeps the second from cancelling.
    """

    name = "batch norm sums"

    def __init__(self, module: nn.Module) -> None:
        layers, targets = batch_norm_layers(module), batch_norm_targets(module)
        self._layers = {name: layers[name] for name in targets}
        self._targets = targets
        self._seen: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
        self._norms: BatchNorms | None = None

    @property
    def norms(self) -> BatchNorms:
        """The batch norms that ran; known after the first pass."""
        if self._norms is None:
            raise UnsupportedModelError("no forward pass was watched yet, so its batch norms are not known")
        return self._norms

    @contextmanager
    def watch(self, count: int) -> Iterator[None]:
        """Hook the batch norms for a forward pass."""
        self._seen = {}
        names = {id(layer): name for name, layer in self._layers.items()}

        def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name = names[id(layer)]
            self._seen.setdefault(name, []).append(
                _sums(args[0] if args else kwargs["input"], self._targets[name].mean)
            )

        with hooked(pre=[(layer, look) for layer in self._layers.values()], with_kwargs=True):
            yield

    def rows(self, logits: Tensor) -> Tensor:
        """Return `[B, 2C]`: the sums of all channels, then the sums of squares of all channels.

        A batch norm that runs on parts of images (windows) sees those of one image next to each other; one that runs
        several times in a pass sums over all of its calls. One that does not run is left out.

        Raises:
            UnsupportedModelError: no batch norm ran, its input is no multiple of the images, or others ran before.
        """
        images = len(logits)
        names = [name for name in self._layers if name in self._seen]
        if not names:
            raise UnsupportedModelError("none of the batch norms runs in a forward pass, so their inputs are not known")
        values = []
        for name in names:
            if any(len(sums) % images for sums, _, _ in self._seen[name]):
                raise UnsupportedModelError(f"batch norm {name!r} does not see the {images} images one after another")
            values.append(sum(count * len(sums) // images for sums, _, count in self._seen[name]))
        self._remember(names, values)
        columns = []
        for of_call in (itemgetter(0), itemgetter(1)):
            for name in names:
                calls = map(of_call, self._seen[name])
                columns.append(torch.stack([part.view(images, -1, part.shape[1]).sum(1) for part in calls]).sum(0))
        self._seen = {}
        return torch.cat(columns, 1)

    def _remember(self, names: list[str], values: list[int]) -> None:
        variances = [self._targets[name].variance.double().cpu() for name in names]
        channels = tuple(len(variance) for variance in variances)
        counts = torch.tensor(values, dtype=torch.float64).repeat_interleave(torch.tensor(channels))
        norms = BatchNorms(tuple(names), channels, counts, torch.cat(variances))
        if self._norms is None:
            self._norms = norms
        elif self._norms.names != norms.names or not torch.equal(self._norms.values, norms.values):
            raise UnsupportedModelError("the network runs other batch norms on other images; their sums do not compare")


def gap_norms(sums: Tensor, squares: Tensor, images: int, norms: BatchNorms, spread: Spread = "variance") -> Tensor:
    """Return `|mean - mean_l|` of each batch norm, then `|variance - variance_l|` of each, `[..., 2L]`.

    These are L2 norms over channels.

    Args:
        sums: float64 `[..., C]`, summed over the images of a set: inputs minus running means.
        squares: float64 `[..., C]`, summed over the images: squares of these.
        images: how many images were summed.
        norms: what the sums belong to.
        spread: `std` compares standard deviations instead of variances. Variances are biased.
    """
    count = norms.values * images
    gap = sums / count
    variance = (squares / count - gap.square()).clamp(min=0)
    other = variance - norms.variance if spread == "variance" else variance.sqrt() - norms.variance.sqrt()
    return torch.cat([_layer_norms(gap, norms), _layer_norms(other, norms)], -1)


def layer_gaps(sums: Tensor, squares: Tensor, images: int, norms: BatchNorms, spread: Spread = "variance") -> Tensor:
    """Return `|mean - mean_l| + |variance - variance_l|` of each batch norm, `[..., L]`; arguments as `gap_norms`."""
    means, spreads = gap_norms(sums, squares, images, norms, spread).chunk(2, -1)
    return means + spreads


def set_sensitivity(
    table: Tensor, norms: BatchNorms, spread: Spread = "variance", weights: Tensor | None = None
) -> Tensor:
    """Return `S_i = D(X) - D(X without i)` for every image of a set, float64 `[B]` (GenQ, arXiv:2312.05272, Eq. 7).

    High where the set comes closer to the batch norms without the image. Costs `O(B C)` after the forward pass, where
    the definition asks for `B` forward passes of `B - 1` images; exact up to rounding.

    Args:
        table: `[B, 2C]`, the rows of a `BatchNormProbe` for the images of the set.
        norms: what the columns belong to.
        spread: what is compared beside the mean.
        weights: float64 `[2L]`, of the gaps that `D` adds up, in the order of `gap_norms`; none: all are 1.

    Raises:
        DataError: there are fewer than 2 images, so that nothing is left without one.
    """
    if len(table) < 2:
        raise DataError(f"batch norm sensitivity compares a set with and without an image; {len(table)} is too few")
    weights = torch.ones(2 * len(norms.names), dtype=torch.float64) if weights is None else weights
    sums, squares = totals(table)
    without = []
    for rows in torch.split(table, _LEFT_OUT_TOGETHER):
        less, less_squares = rows.double().chunk(2, 1)
        without.append(gap_norms(sums - less, squares - less_squares, len(table) - 1, norms, spread) @ weights)
    return gap_norms(sums, squares, len(table), norms, spread) @ weights - torch.cat(without)


def mean_sensitivity(
    candidates: Candidates,
    norms: BatchNorms,
    spread: Spread,
    *,
    set_size: int | None,
    partitions: int,
    weights: Tensor | None = None,
) -> Tensor:
    """Return `set_sensitivity` of the candidates, averaged over random divisions into sets, float64 `[n]`.

    Args:
        candidates: with the rows of a `BatchNormProbe`, `[M, 2C]`.
        norms: what the columns belong to.
        spread: what is compared beside the mean.
        set_size: images in a set, about; fewer images than that are one set. None: one set.
        partitions: random divisions; one set is divided once.
        weights: as in `set_sensitivity`.
    """
    table, chosen, generator = candidates.table, candidates.chosen, candidates.rng.generator("partitions")
    sets = 1 if set_size is None else max(1, -(-len(chosen) // set_size))
    sets = min(sets, max(1, len(chosen) // 2))  # a set needs two images
    if sets == 1:
        return set_sensitivity(table[chosen], norms, spread, weights)
    scores = torch.zeros(len(chosen), dtype=torch.float64)
    for _ in range(partitions):
        order = torch.randperm(len(chosen), generator=generator)
        for part in order.tensor_split(sets):
            # Sorted, so that a table in a file is read in one direction.
            places = part.sort().values
            scores[places] += set_sensitivity(table[chosen[places]], norms, spread, weights)
    return scores / partitions


def totals(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sums of rows `[B, 2C]` of a `BatchNormProbe` over the images, float64 `[C]`."""
    sums, squares = table.sum(0, dtype=torch.float64).chunk(2)
    return sums, squares


class BatchNormFilter(Filter):
    """What these filters share: the probe, and which statistic is compared."""

    spread: Spread = "variance"
    """What is compared beside the mean: `variance` as the paper says, or `std` as image synthesis does."""

    def supports(self, model: FloatModel) -> bool:
        """Whether the network has batch norms with running statistics."""
        return bool(batch_norm_targets(model.module))

    def probe(self, model: FloatModel) -> BatchNormProbe:
        """Return what sums up the inputs of the batch norms; raises `UnsupportedModelError` if there are none."""
        if not self.supports(model):
            raise unfit(self, model, "no batch norm with running statistics")
        return BatchNormProbe(model.module)


@SELECTORS.register("bn_distance")
class BatchNormDistance(BatchNormFilter):
    """Distance of each image alone to the batch-norm statistics, after GenQ (arXiv:2312.05272, Eq. 6).

    Keeps the images of the lowest `D = sum_l (|mean - mean_l| + |variance - variance_l|)`, statistics taken over the
    positions of the one image. GenQ defines `D` for sets and reports that ranking single images by it does not help,
    because the statistics of one image are not those of a batch: it is here to compare with; use `bn_sensitivity`.
    """

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the distances; they depend on the image alone."""
        norms: BatchNorms = candidates.probe.norms
        parts = []
        for places in torch.split(candidates.chosen, _LEFT_OUT_TOGETHER):
            sums, squares = candidates.table[places].double().chunk(2, 1)
            parts.append(layer_gaps(sums, squares, 1, norms, self.spread).sum(1))
        return torch.cat(parts)


@SELECTORS.register("bn_sensitivity")
class BatchNormSensitivity(BatchNormFilter):
    """Batch-norm sensitivity filtering of GenQ (arXiv:2312.05272, Eq. 6 and 7).

    Keeps the images of the lowest `S_i = D(X) - D(X without i)`: an image with a high one pulls its set `X` away from
    the batch-norm statistics. A score depends on the set it is computed in. GenQ does not say which: here what the
    filters before kept is divided at random into sets of nearly `set_size` images, `partitions` times, and an image's
    score is the mean over the partitions. All sets come from the sums of one forward pass. Sets are drawn across
    classes; with `per_class` only the ranking is within a class. One shot, as in GenQ: sums are not updated while
    images are removed, so a strong filter can overshoot and leave a set that is off to the other side; the report says
    how far pool and rest are from the batch norms.
    """

    set_size: int | None = Field(default=256, ge=2)
    """Images in a set, about; fewer images than that are one set. None: one set, whose sums must fit into memory."""

    partitions: int = Field(default=8, ge=1)
    """Random partitions that a score is averaged over; one is enough where all images are one set."""

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the sensitivities among the candidates. Raises `DataError` for fewer than 2 images."""
        return mean_sensitivity(
            candidates, candidates.probe.norms, self.spread, set_size=self.set_size, partitions=self.partitions
        )


def _sums(inputs: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, int]:
    """Sum over positions of inputs `[N, C, ...]` minus their means, and of its square, `[N, C]`; the positions."""
    centred = inputs.float().flatten(2) if inputs.ndim > 2 else inputs.float().unsqueeze(2)
    centred = centred - mean.float()[:, None]
    return centred.sum(2), centred.square().sum(2), centred.shape[2]


def _layer_norms(values: Tensor, norms: BatchNorms) -> Tensor:
    """L2 norms over the channels of each batch norm, `[..., L]`, of `[..., C]`."""
    return torch.stack([part.square().sum(-1) for part in torch.split(values, list(norms.channels), -1)], -1).sqrt()
