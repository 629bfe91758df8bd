"""Filters one after another over the rows of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synthquant.core.errors import DataError, InputError
from synthquant.core.progress import QUIET, Progress
from synthquant.core.rng import Rng
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.methods import SELECTORS, Candidates, Probe, Selector
from synthquant.models.float_model import FloatModel
from synthquant.select.keep import keep_best, quotas
from synthquant.select.scan import TABLE_GIB, Block, Scan, scan

Look = Callable[[ImageSet, FloatModel, Sequence[Selector], int, Progress], Generator[Block]]
"""Yields the blocks of a pool in order, for the probes of filters, in batches of so many."""


@dataclass(frozen=True)
class Step:
    """What one filter did."""

    method: str
    """Registered name of the filter."""
    column: str
    """Name of the column that holds its scores."""
    filter: Selector
    """The filter with its settings."""
    entered: Tensor
    """int64 `[n]`, places in the pool of the images it scored."""
    scores: Tensor
    """float64 `[n]`."""
    stayed: Tensor
    """bool `[n]`, which of them it kept."""


@dataclass(frozen=True)
class Selection:
    """Images chosen from a pool, with all that is known of the choice."""

    pool: ImageSet
    """The whole pool, with a column of scores for each filter; none where an image was not scored."""
    positions: Tensor
    """int64 `[k]`, places in the pool of the images that stay, ascending."""
    steps: tuple[Step, ...]
    """What each filter did, in order."""
    scan: Scan
    """The rows of the one forward pass."""
    probes: Mapping[str, Probe]
    """What made the rows, by name."""

    @property
    def kept(self) -> ImageSet:
        """The images that stay, in the order of the pool, with their scores."""
        return self.pool.subset(self.positions)

    def worst(self, count: int) -> Tensor:
        """Return places in the pool, int64, of up to `count` images that were taken out: the worst of each filter."""
        share = -(-count // len(self.steps))
        gone = []
        for step in self.steps:
            order = torch.argsort(step.scores, descending=not step.filter.keeps_highest, stable=True)
            gone.append(step.entered[order[~step.stayed[order]][:share]])
        return torch.cat(gone)[:count]

    @property
    def unusable(self) -> int:
        """Images that could not be read, or gave numbers that are not finite."""
        return len(self.pool) - int(self.scan.finite.sum())


def run_filters(
    filters: Sequence[Selector],
    images: Any,
    model: FloatModel,
    rng: Rng,
    *,
    also: Sequence[Probe] = (),
    batch_size: int = 64,
    table_gib: float = TABLE_GIB,
    progress: Progress = QUIET,
    look: Look | None = None,
) -> Selection:
    """Let each filter choose from what those before it kept; the network sees every image once.

    Args:
        filters: at least one.
        images: the pool, an image set or what else `open_images` takes, of any size and made for any network; images
            are brought to this one's input size.
        model: the network that scores.
        rng: filter `i` draws from its child `i` only.
        also: further probes for the pass.
        batch_size: images in a forward pass; scores do not depend on it beyond rounding.
        table_gib: larger tables than this are kept in a temporary file.
        progress: told how far the pass is, and what had to be left out.
        look: runs the network over the pool with the probes of these filters and with `also`, in place of this
            process.

    Raises:
        UnsupportedModelError: the network lacks what a filter scores by; before the first image is read.
        DataError: there are no images, none can be used, a filter is to keep more than there are, or labels are
            missing.
        OutputError: a temporary file cannot be made.
    """
    if not filters:
        raise InputError("no filter to select with; name at least one")
    pool = open_images(images)
    labels = require_pool(filters, pool)
    own = [filter_.probe(model) for filter_ in filters]
    # Filters that ask for the same probe share one; its rows are made once.
    probes = {probe.name: probe for probe in (*own, *also)}
    with closing(look(pool, model, filters, batch_size, progress)) if look else nullcontext() as blocks:
        seen = scan(
            pool, model, list(probes.values()),
            batch_size=batch_size, table_gib=table_gib, progress=progress, blocks=blocks,
        )  # fmt: skip
    rows = _usable(seen, pool, progress)
    steps: list[Step] = []
    for index, filter_ in enumerate(filters):
        method, name = registered_name(filter_), own[index].name
        table, places, child = seen.tables[name], seen.positions[rows], rng.child(str(index))
        left = pool.subset(places)
        with _named(method):
            scores = filter_.scores(Candidates(probes[name], table, rows, left, model, child, batch_size, progress))
        groups = None if labels is None or not filter_.per_class else labels[places]
        with _named(method):
            if groups is not None and labels is not None:
                _require_classes(filter_, labels, places)
            stayed = keep_best(scores, filter_.keep, highest=filter_.keeps_highest, labels=groups)
        column = _column(method, [step.method for step in steps], model)
        steps.append(Step(method, column, filter_, places, scores, stayed))
        rows = rows[stayed]
    scored = pool.with_columns(**{step.column: _spread(step, len(pool)) for step in steps})
    return Selection(scored, seen.positions[rows], tuple(steps), seen, probes)


def require_supported(filters: Sequence[Selector], model: FloatModel) -> None:
    """Raise `UnsupportedModelError` for the first filter that lacks in the network what it scores by."""
    for filter_ in filters:
        filter_.probe(model)


def require_pool(filters: Sequence[Selector], images: ImageSet) -> Tensor | None:
    """Return the labels, int64 `[n]`, if a filter needs them.

    Raises `DataError` if it does and one is missing, or if more images, or more of a class, are to stay than there are.
    """
    labels = _labels(filters, images)
    require_enough(filters, len(images), labels)
    return labels


def require_enough(filters: Sequence[Selector], count: int, labels: Tensor | None = None) -> None:
    """Raise `DataError` for a count to keep that `count` images cannot meet whatever their scores are.

    Without `labels`, int64 `[count]`, filters that keep images of each class are only held to the number of all.
    """
    left = torch.tensor([count])
    for filter_ in filters:
        with _named(registered_name(filter_)):
            if filter_.per_class and labels is not None:
                _require_classes(filter_, labels, torch.arange(count))
                return  # which classes are left behind earlier filters is not known yet
            left = quotas(filter_.keep, left)
            if filter_.per_class:
                return  # nor how many, where the classes are not known


def registered_name(filter_: Selector) -> str:
    """Return the name a filter is registered under; raises `InputError` if it is not."""
    for name, cls in SELECTORS.items():
        if cls is type(filter_):
            return name
    raise InputError(f"{type(filter_).__name__} is not registered; put @SELECTORS.register(NAME) above it")


def _labels(filters: Sequence[Selector], images: ImageSet) -> Tensor | None:
    """The labels, if they are needed."""
    asking = next((filter_ for filter_ in filters if filter_.per_class), None)
    if asking is None:
        return None
    without = len(images) if images.labels is None else int((images.labels < 0).sum())
    if without:
        raise DataError(
            f"{without} of {len(images)} images have no label, which {registered_name(asking)} needs to keep images of"
            " each class; leave per_class out or give labelled images"
        )
    return images.labels


def _require_classes(filter_: Selector, labels: Tensor, places: Tensor) -> None:
    """Raise `DataError` if a class of the pool has fewer images at `places` than the count to keep, or none."""
    if isinstance(filter_.keep, int):
        classes, members = torch.unique(labels, return_inverse=True)
        quotas(filter_.keep, torch.bincount(members[places], minlength=len(classes)), classes)


@contextmanager
def _named(method: str) -> Iterator[None]:
    """Say which filter an error is about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{method}: {error}") from error


def _usable(seen: Scan, images: ImageSet, progress: Progress) -> Tensor:
    """Rows of the images whose numbers are all finite, int64; others would spoil every sum they are part of."""
    rows = seen.finite.nonzero().flatten()
    if len(rows) < len(seen.finite):
        where = ", ".join(str(place) for place in seen.positions[~seen.finite][:5].tolist())
        progress.warn(
            f"{len(seen.finite) - len(rows)} images give numbers that are not finite and are left out: {where}"
        )
    if not len(rows):
        raise DataError(
            f"none of the {len(images)} images gives finite numbers in the network; check its preprocessing"
        )
    return rows


def _column(method: str, before: Sequence[str], model: FloatModel) -> str:
    """A column's name says which network gave the scores, so that several can score one pool."""
    again = before.count(method)
    numbered = f"{method}.{again + 1}" if again else method
    return f"{numbered}@{model.name}-{model.fingerprint[:8]}"


def _spread(step: Step, count: int) -> list[float | None]:
    """A step's scores as a column of the pool."""
    column = torch.full((count,), torch.nan, dtype=torch.float64)
    column[step.entered] = step.scores
    return [None if score != score else score for score in column.tolist()]
