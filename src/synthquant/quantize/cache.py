"""Where the inputs and outputs of units are kept: on the device, in main memory or in files, under a budget."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from synthquant.core.errors import InputError, OutputError
from synthquant.core.free_memory import GIB, free_memory
from synthquant.methods import MemoryBudget
from synthquant.models.signature import Leaves, TensorSpec

_LARGEST_HALF = torch.finfo(torch.float16).max
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CacheStore:
    """Hands out caches and remembers how much each place holds.

    Memory is taken on the device first (if that is an accelerator), then in main memory, and what fits in neither
    budget goes to files in `folder`. A cache gives its place back when the last reference to it goes.

    Attributes:
        used: bytes held now, by place.
        peak: most bytes ever held, by place.
    """

    def __init__(self, budget: MemoryBudget, device: torch.device, folder: Path | None = None) -> None:
        self.device = device
        self.dtype = _DTYPES[budget.cache_dtype]
        self._folder = folder
        self._limits = _limits(budget, device)
        self.used = {"device": 0, "host": 0, "disk": 0}
        self.peak = dict(self.used)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> RowCache:
        """A cache of `shape[0]` rows; floating-point rows are kept in the budget's precision."""
        kept = self.dtype if dtype.is_floating_point else dtype
        size = torch.Size(shape).numel() * kept.itemsize
        place = next((p for p, limit in self._limits.items() if self.used[p] + size <= limit), "disk")
        cache = RowCache(shape, dtype, kept, self.device, place, self._file() if place == "disk" else None)
        self.used[place] += size
        self.peak[place] = max(self.peak[place], self.used[place])
        weakref.finalize(cache, self._release, place, size)
        return cache

    def _release(self, place: str, size: int) -> None:
        self.used[place] -= size

    def _file(self) -> int:
        """An open file without a name: it goes when it is closed, whatever happens to the process."""
        try:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix="cache-", dir=self._folder)
            os.unlink(path)
        except OSError as error:
            where = self._folder or tempfile.gettempdir()
            raise OutputError(f"cannot keep a cache in {where}: {error.strerror}; raise the memory budget") from error
        return handle


class RowCache:
    """`shape[0]` rows of one shape, written once in order and read in any order.

    Rows of four dimensions are kept channels-last, as convolutions read them fastest. What is read is always a fresh
    tensor of the original precision on the device: writing into it does not touch the cache.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        kept: torch.dtype,
        device: torch.device,
        place: str,
        handle: int | None,
    ) -> None:
        self.shape = shape
        self.place = place
        self._dtype = dtype
        self._kept = kept
        self._device = device
        self._handle = handle
        self._width = torch.Size(shape[1:]).numel()
        self._rows: torch.Tensor | None = None
        if handle is None:
            where = device if place == "device" else torch.device("cpu")
            self._rows = torch.empty(shape[0], self._width, dtype=kept, device=where)
        else:
            weakref.finalize(self, os.close, handle)

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Keep `rows` from row `start` on.

        Raises:
            InputError: a value is too large for float16.
        """
        if self._kept == torch.float16 and rows.numel() and float(rows.abs().amax()) > _LARGEST_HALF:
            raise InputError(
                f"an activation of {float(rows.abs().amax()):.3g} does not fit into a float16 cache (up to "
                f"{_LARGEST_HALF:.0f}); set memory.cache_dtype to bfloat16 or float32"
            )
        last = rows.permute(0, 2, 3, 1) if rows.ndim == 4 else rows
        flat = last.reshape(len(rows), -1)
        if self._rows is not None:
            self._rows[start : start + len(rows)].copy_(flat)
            return
        data = flat.to("cpu", self._kept).contiguous()
        self._pwrite(_bytes(data), start * self._width * self._kept.itemsize)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop`, `[stop - start, ...]`."""
        if self._rows is not None:
            return self._shaped(self._rows[start:stop].to(self._device, self._dtype, copy=True))
        rows = torch.empty(stop - start, self._width, dtype=self._kept)
        self._pread(_bytes(rows), start * self._width * self._kept.itemsize)
        return self._shaped(rows.to(self._device, self._dtype))

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """The rows of an index `[B]` (on any device), `[B, ...]`."""
        if self._rows is not None:
            rows = self._rows.index_select(0, index.to(self._rows.device))
            return self._shaped(rows.to(self._device, self._dtype))
        rows = torch.empty(len(index), self._width, dtype=self._kept)
        step = self._width * self._kept.itemsize
        for view, row in zip(rows, index.tolist(), strict=True):
            self._pread(_bytes(view), row * step)
        return self._shaped(rows.to(self._device, self._dtype))

    def _shaped(self, flat: torch.Tensor) -> torch.Tensor:
        if len(self.shape) == 4:
            channels, height, width = self.shape[1:]
            return flat.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(-1, *self.shape[1:])

    def _pwrite(self, data: memoryview, offset: int) -> None:
        assert self._handle is not None
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._handle, data[done:], offset + done)
        except OSError as error:
            raise OutputError(
                f"cannot write a cache file: {error.strerror}; free disk space or lower the count"
            ) from error

    def _pread(self, data: memoryview, offset: int) -> None:
        assert self._handle is not None
        done = 0
        while done < len(data):
            count = os.preadv(self._handle, [data[done:]], offset + done)
            if count == 0:
                raise RuntimeError("cache row read before it was written")
            done += count


class LeafCaches:
    """Caches of the tensors in a tree that have rows for each sample: of arguments, or of what a unit puts out.

    Attributes:
        specs: what the tensors are.
        rows: a cache for each.
        infinite: places of those that hold infinite values, as masks of attention do.
    """

    def __init__(self, specs: Sequence[TensorSpec], rows: Sequence[RowCache]) -> None:
        self.specs = tuple(specs)
        self.rows = list(rows)
        self.infinite: set[int] = set()

    def read(self, start: int, stop: int) -> Leaves:
        """The tensors of the samples from `start` to `stop` (exclusive)."""
        return [spec.from_rows(cache.read(start, stop)) for spec, cache in zip(self.specs, self.rows, strict=True)]

    def gather(self, index: torch.Tensor) -> Leaves:
        """The tensors of samples of these indices `[B]`."""
        return [spec.from_rows(cache.gather(index)) for spec, cache in zip(self.specs, self.rows, strict=True)]

    def write(self, start: int, leaves: Leaves, which: Collection[int] | None = None) -> None:
        """Keep the tensors of samples from `start` on; only those at the places `which`, if they are given."""
        for place, (spec, cache, leaf) in enumerate(zip(self.specs, self.rows, leaves, strict=True)):
            if which is None or place in which:
                cache.write(start, spec.to_rows(leaf))
            if leaf.is_floating_point() and bool(leaf.isinf().any()):
                self.infinite.add(place)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _limits(budget: MemoryBudget, device: torch.device) -> dict[str, float]:
    """Bytes allowed by place, in the order in which they are filled."""
    limits: dict[str, float] = {}
    if device.type == "cuda":
        limits["device"] = free_memory(device) / 2 if budget.device_gib is None else budget.device_gib * GIB
    if budget.host_gib is None:
        limits["host"] = free_memory(torch.device("cpu")) / 2
    else:
        limits["host"] = budget.host_gib * GIB
    return limits


@dataclass
class Stream:
    """What one of the two networks (float or quantized) put out so far: caches of unit outputs still needed."""

    outputs: dict[int, LeafCaches] = field(default_factory=dict)

    def read(self, start: int, stop: int, unit: int) -> Leaves:
        """What a unit put out for the samples from `start` to `stop` (exclusive)."""
        return self.outputs[unit].read(start, stop)

    def gather(self, batch: torch.Tensor, unit: int) -> Leaves:
        """What a unit put out for samples of these indices `[B]`."""
        return self.outputs[unit].gather(batch)

    def drop_all_but(self, needed: set[int]) -> None:
        """Let go of what no later unit reads."""
        for index in set(self.outputs) - needed:
            del self.outputs[index]
