"""Caches hold the same rows wherever they are kept, and no more than the budget says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from synthquant.core.errors import InputError, OutputError
from synthquant.methods import MemoryBudget
from synthquant.quantize.cache import CacheStore

CPU = torch.device("cpu")
GIB = 2**30


def store(folder: Path | None = None, host_gib: float | None = 1.0, dtype: str = "float32") -> CacheStore:
    return CacheStore(MemoryBudget(host_gib=host_gib, cache_dtype=dtype), CPU, folder)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("host_gib", [1.0, 0.0])
@pytest.mark.parametrize("shape", [(10, 3, 4, 5), (10, 7), (10, 2, 3), (10,), (10, 2, 3, 4, 5)])
def test_rows_come_back_as_they_were(tmp_path: Path, host_gib: float, shape: tuple[int, ...]) -> None:
    values = rows(*shape)
    cache = store(tmp_path, host_gib).allocate(shape)
    assert cache.place == ("host" if host_gib else "disk") and len(cache) == 10
    for start in range(0, 10, 4):
        cache.write(start, values[start : start + 4])
    assert torch.equal(cache.read(0, 10), values) and torch.equal(cache.read(3, 5), values[3:5])
    index = torch.tensor([9, 0, 0, 4])
    assert torch.equal(cache.gather(index), values[index])
    for fresh in (cache.read(0, 10), cache.gather(torch.arange(10))):
        fresh.zero_()
    assert torch.equal(cache.read(0, 10), values)


@pytest.mark.parametrize("host_gib", [1.0, 0.0])
def test_feature_maps_are_kept_channels_last(tmp_path: Path, host_gib: float) -> None:
    cache = store(tmp_path, host_gib).allocate((4, 3, 5, 6))
    cache.write(0, rows(4, 3, 5, 6))
    assert cache.read(0, 4).is_contiguous(memory_format=torch.channels_last)
    assert cache.gather(torch.tensor([1, 2])).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("host_gib", [1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_other_types_keep_their_type(tmp_path: Path, host_gib: float, dtype: torch.dtype) -> None:
    values = torch.randint(0, 2, (6, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    cache = store(tmp_path, host_gib, "bfloat16").allocate((6, 3), dtype)
    cache.write(0, values)
    assert torch.equal(cache.read(0, 6), values)
    assert cache.gather(torch.tensor([2])).dtype == dtype


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-10)])
@pytest.mark.parametrize("host_gib", [1.0, 0.0])
def test_half_precision_takes_half_the_place(tmp_path: Path, host_gib: float, dtype: str, tolerance: float) -> None:
    where = store(tmp_path, host_gib, dtype)
    cache = where.allocate((8, 16))
    values = rows(8, 16)
    cache.write(0, values)
    assert cache.read(0, 8).dtype == torch.float32
    assert torch.allclose(cache.read(0, 8), values, rtol=tolerance, atol=1e-6)
    assert sum(where.used.values()) == 8 * 16 * 2


@pytest.mark.parametrize("host_gib", [1.0, 0.0])
def test_what_float16_cannot_hold_is_refused(tmp_path: Path, host_gib: float) -> None:
    cache = store(tmp_path, host_gib, "float16").allocate((2, 3))
    cache.write(0, torch.full((1, 3), 65504.0))
    with pytest.raises(InputError, match=r"7e\+04 does not fit into a float16 cache .*bfloat16 or float32"):
        cache.write(1, torch.full((1, 3), -7e4))


def test_the_budget_is_filled_first_and_never_exceeded(tmp_path: Path) -> None:
    where = store(tmp_path, host_gib=1000 / GIB)
    first = where.allocate((100, 2))  # 800 bytes
    second = where.allocate((100, 1))
    third = where.allocate((50, 1))  # 200 bytes: fits beside the first
    assert [cache.place for cache in (first, second, third)] == ["host", "disk", "host"]
    assert where.used == {"device": 0, "host": 1000, "disk": 400}
    del first
    assert where.used["host"] == 200 and where.peak == {"device": 0, "host": 1000, "disk": 400}
    assert where.allocate((100, 2)).place == "host"


def test_files_have_no_name_and_go_with_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    cache = store(folder, 0.0).allocate((1000, 100))
    cache.write(0, rows(1000, 100))
    assert folder.is_dir() and not list(folder.iterdir())
    handle = cache._handle
    assert handle is not None and Path(f"/proc/self/fd/{handle}").exists()
    del cache
    assert not Path(f"/proc/self/fd/{handle}").exists()


def test_an_unusable_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot keep a cache in .*file.*raise the memory budget"):
        store(tmp_path / "file", 0.0).allocate((2, 2))


def test_reading_what_was_never_written_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="before it was written"):
        store(tmp_path, 0.0).allocate((2, 2)).read(0, 2)


def test_without_numbers_half_of_what_is_free_is_used() -> None:
    assert store(None, None).allocate((10, 10)).place == "host"
