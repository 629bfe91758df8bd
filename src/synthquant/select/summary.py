"""What a selection did, in numbers that a report can show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from synthquant.core.settings import Settings
from synthquant.select.batch_norm import BatchNormProbe, layer_gaps
from synthquant.select.scan import Scan

if TYPE_CHECKING:
    from synthquant.data.image_set import ImageSet
    from synthquant.models.float_model import FloatModel
    from synthquant.select.sequence import Selection, Step

_BINS = 40
_ROWS_TOGETHER = 256


def summarize(selection: Selection, model: FloatModel, real: Scan | None) -> dict[str, Any]:
    """Return counts, histograms of scores, class balance, pixel and batch-norm statistics as plain data.

    Args:
        selection: what was done.
        model: the network that scored.
        real: a pass over real images, to stand beside the pool; with the same batch-norm probe if there was one.
    """
    kept = torch.isin(selection.scan.positions, selection.positions)
    finite = selection.scan.finite
    norms = selection.probes.get(BatchNormProbe.name)
    sets = {"pool": (selection.scan, finite), "kept": (selection.scan, kept)}
    if real is not None:
        sets["real"] = (real, real.finite)
    return {
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "pool": len(selection.pool),
        "unusable": selection.unusable,
        "kept": len(selection.positions),
        "real": None if real is None else int(real.finite.sum()),
        "steps": [describe_step(step) for step in selection.steps],
        "classes": _classes(selection.pool, selection.positions),
        "pixels": {name: _pixels(seen.pixels[rows]) for name, (seen, rows) in sets.items()},
        "batch_norm": _gaps(norms, sets) if isinstance(norms, BatchNormProbe) else None,
        "pool_duplicates": _duplicates(selection.pool),
    }


def describe_step(step: Step) -> dict[str, Any]:
    """Return what a filter did, with the histogram of its scores."""
    edges = np.histogram_bin_edges(step.scores.numpy(), _BINS)
    stayed = step.scores[step.stayed].numpy()
    gone = step.scores[~step.stayed].numpy()
    return {
        "method": step.method,
        "column": step.column,
        "settings": cast(Settings, step.filter).model_dump(mode="json"),
        "highest": step.filter.keeps_highest,
        "entered": len(step.entered),
        "kept": int(step.stayed.sum()),
        "edges": edges.tolist(),
        "kept_counts": np.histogram(stayed, edges)[0].tolist(),
        "rejected_counts": np.histogram(gone, edges)[0].tolist(),
    }


def _classes(pool: ImageSet, kept: Tensor) -> dict[str, list[int]] | None:
    """Images of each class, by class number, in the pool and among those that stay."""
    if pool.labels is None:
        return None
    labels = pool.labels
    count = int(labels.max()) + 1
    before, after = labels[labels >= 0], labels[kept]
    return {
        "pool": torch.bincount(before, minlength=count).tolist(),
        "kept": torch.bincount(after[after >= 0], minlength=count).tolist(),
    }


def _pixels(moments: Tensor) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel over images of one size, in pixel space."""
    mean, square = moments.double().mean(0).chunk(2)
    return {"mean": mean.tolist(), "std": (square - mean.square()).clamp(min=0).sqrt().tolist()}


def _gaps(probe: BatchNormProbe, sets: dict[str, tuple[Scan, Tensor]]) -> dict[str, Any]:
    """Distance of each set to each batch norm."""
    gaps: dict[str, Any] = {"layers": list(probe.norms.names)}
    for name, (seen, mask) in sets.items():
        table = seen.tables[probe.name]
        totals = torch.zeros(table.shape[1], dtype=torch.float64)
        for rows in torch.split(mask.nonzero().flatten(), _ROWS_TOGETHER):
            totals += table[rows].sum(0, dtype=torch.float64)
        sums, squares = totals.chunk(2)
        gaps[name] = layer_gaps(sums, squares, int(mask.sum()), probe.norms).tolist()
    return gaps


def _duplicates(pool: ImageSet) -> int | None:
    """Repeated images, if the pool was checked for them."""
    found = pool.manifest.quality.get("duplicate")
    return None if found is None else len(found)
