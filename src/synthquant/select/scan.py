"""One streaming forward pass over a pool of images that feeds every filter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from synthquant.core.errors import OutputError
from synthquant.core.formatting import size
from synthquant.core.modules import eval_mode
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches
from synthquant.methods import Probe
from synthquant.models.float_model import FloatModel
from synthquant.models.samples import none_readable

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


@dataclass(frozen=True)
class Block:
    """What a forward pass left of the images of a batch."""

    positions: Sequence[int]
    """Places of those that could be read, counted from `first`."""
    rows: Mapping[str, Tensor]
    """`[B, K]`, by the name of the probe."""
    pixels: Tensor
    """`[B, 6]`, as in `Scan`."""
    first: int = 0
    """Place in the pool of the first image."""


@torch.no_grad()
def look(images: ImageSet, model: FloatModel, probes: Sequence[Probe], batch_size: int) -> Iterator[Block]:
    """Run the network on a pool, in eval mode, and yield what is left of each batch.

    Broken images are noted in `images.set_aside`. The network is afterwards as before, whatever is raised.
    """
    with eval_mode(model.module):
        for batch in input_batches(images, model.preprocess, batch_size):
            inputs = batch.inputs.to(model.device)
            with ExitStack() as watching:
                for probe in probes:
                    watching.enter_context(probe.watch(len(inputs)))
                logits = model.logits(inputs)
            rows = {probe.name: probe.rows(logits).float().cpu() for probe in probes}
            pixels = _pixel_moments(model.preprocess.pixels(inputs)).float().cpu()
            yield Block(batch.indices, rows, pixels)


def scan(
    images: ImageSet,
    model: FloatModel,
    probes: Sequence[Probe],
    *,
    batch_size: int = 64,
    table_gib: float = TABLE_GIB,
    title: str = "score images",
    progress: Progress = QUIET,
    blocks: Iterator[Block] | None = None,
) -> Scan:
    """Run the network once on every image, in eval mode, and keep the rows that the probes make.

    Images are decoded ahead and dropped after their batch; only the tables stay. Broken images are left out and noted
    in `images.set_aside`. The network is afterwards as before, whatever is raised.

    Args:
        images: the pool.
        model: the network.
        probes: what watches it, each under a name of its own.
        batch_size: images in a forward pass.
        table_gib: larger tables are kept in a temporary file.
        title: of the progress bar.
        progress: told how far it is.
        blocks: of all images, in order, where others have looked at them.

    Raises:
        DataError: no image can be read.
        UnsupportedModelError: the network does not return logits, or lacks what a probe looks for.
        OutputError: a large table's temporary file cannot be made.
    """
    if blocks is None:
        blocks = look(images, model, probes, batch_size)
    else:
        _introduce(model, probes)
    tables = {name: _Table(len(images), table_gib) for name in ("pixels", *(probe.name for probe in probes))}
    positions: list[int] = []
    finite = []
    with progress.bar(title, len(images)) as bar:
        for block in blocks:
            rows = {"pixels": block.pixels, **block.rows}
            for name, part in rows.items():
                tables[name].append(part)
            finite.append(torch.stack([part.isfinite().all(1) for part in rows.values()]).all(0))
            positions += [block.first + place for place in block.positions]
            bar.advance(len(block.positions))
    if not positions:
        raise none_readable(images, len(images), "to select from")
    return Scan(
        torch.tensor(positions),
        {probe.name: tables[probe.name].finish() for probe in probes},
        tables["pixels"].finish(),
        torch.cat(finite),
    )


@torch.no_grad()
def _introduce(model: FloatModel, probes: Sequence[Probe]) -> None:
    """Show the network to probes whose rows others have made: they learn from a pass what the rows are made of."""
    with eval_mode(model.module), ExitStack() as watching:
        for probe in probes:
            watching.enter_context(probe.watch(2))
        logits = model.logits(model.example_images(2))
        for probe in probes:
            probe.rows(logits)


def _pixel_moments(pixels: Tensor) -> Tensor:
    """Mean of each channel and of its square, `[B, 2C]`, of `[B, C, H, W]`."""
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
        raise OutputError(
            f"cannot make a temporary file of {size(count * width * 4)} in {tempfile.gettempdir()}: {error};"
            " set TMPDIR to a larger place or select from fewer images"
        ) from error
    finally:
        if path:
            os.unlink(path)
