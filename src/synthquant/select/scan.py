"""One streaming forward pass over a pool of images that feeds every filter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from synthquant.core.errors import DataError, OutputError
from synthquant.core.modules import eval_mode
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches
from synthquant.methods import Probe
from synthquant.models.float_model import FloatModel

TABLE_GIB = 4.0
"""Tables up to this size are kept in main memory, larger ones in a temporary file."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a pool left of each image that could be read."""

    positions: Tensor
    """int64 `[M]`, places in the pool, in the order of the tables' rows."""
    tables: Mapping[str, Tensor]
    """float32 `[M, K]` on the CPU, by the name of the probe; the file of a large one goes with the tensor."""
    pixels: Tensor
    """float32 `[M, 6]`: mean of each channel and of its square, in pixel space (0..1 nominal), at input size."""
    finite: Tensor
    """bool `[M]`, whether all numbers of an image are finite."""


@torch.no_grad()
def scan(
    images: ImageSet,
    model: FloatModel,
    probes: Sequence[Probe],
    *,
    batch_size: int = 64,
    table_gib: float = TABLE_GIB,
    title: str = "score images",
    progress: Progress = QUIET,
) -> Scan:
    """Run the network once on every image, in eval mode, and keep the rows that the probes make.

    Images are decoded ahead and dropped after their batch; only the tables stay. Broken images are left out and noted
    in `images.set_aside`. The network is afterwards as before, whatever is raised.

    Raises:
        DataError: no image can be read.
        UnsupportedModelError: the network does not return logits, or lacks what a probe looks for.
        OutputError: a large table's temporary file cannot be made.
    """
    named = {probe.name: probe for probe in probes}
    tables = {name: _Table(len(images), table_gib) for name in (*named, "pixels")}
    positions: list[int] = []
    finite = []
    with eval_mode(model.module), progress.bar(title, len(images)) as bar:
        for batch in input_batches(images, model.preprocess, batch_size):
            inputs = batch.inputs.to(model.device)
            rows = {"pixels": _pixel_moments(model.preprocess.pixels(inputs))}
            with ExitStack() as watching:
                for probe in named.values():
                    watching.enter_context(probe.watch(len(inputs)))
                logits = model.logits(inputs)
            rows |= {name: probe.rows(logits) for name, probe in named.items()}
            for name, part in rows.items():
                tables[name].append(part)
            finite.append(torch.stack([part.isfinite().all(1) for part in rows.values()]).all(0).cpu())
            positions += batch.indices
            bar.advance(len(batch.indices))
    if not positions:
        raise DataError(f"none of the {len(images)} images to select from can be read")
    return Scan(
        torch.tensor(positions),
        {name: tables[name].finish() for name in named},
        tables["pixels"].finish(),
        torch.cat(finite),
    )


def _pixel_moments(pixels: Tensor) -> Tensor:
    """Mean of each channel and of its square, `[B, 6]`, of `[B, 3, H, W]`."""
    return torch.cat([pixels.mean((2, 3)), pixels.square().mean((2, 3))], 1)


class _Table:
    """Rows that are appended batch by batch; their number is known before, their width with the first of them."""

    def __init__(self, count: int, gib: float) -> None:
        self._count = count
        self._gib = gib
        self._rows: Tensor | None = None
        self._filled = 0

    def append(self, rows: Tensor) -> None:
        if self._rows is None:
            size = self._count * rows.shape[1] * 4
            in_memory = size <= self._gib * 2**30
            self._rows = torch.empty(self._count, rows.shape[1]) if in_memory else _in_file(self._count, rows.shape[1])
        self._rows[self._filled : self._filled + len(rows)] = rows.float().cpu()
        self._filled += len(rows)

    def finish(self) -> Tensor:
        return torch.empty(0, 0) if self._rows is None else self._rows[: self._filled]


def _in_file(count: int, width: int) -> Tensor:
    """A float32 tensor `[count, width]` in a file without a name, which goes when the tensor goes."""
    path = ""
    try:
        handle, path = tempfile.mkstemp(prefix="synthquant-scores-")
        os.close(handle)
        return torch.from_file(path, shared=True, size=count * width, dtype=torch.float32).view(count, width)
    except (OSError, RuntimeError) as error:
        gib = count * width * 4 / 2**30
        raise OutputError(
            f"cannot make a temporary file of {gib:.1f} GiB in {tempfile.gettempdir()}: {error};"
            " set TMPDIR to a larger place or select from fewer images"
        ) from error
    finally:
        if path:
            os.unlink(path)
