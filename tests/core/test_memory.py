"""Memory that runs out is told from every other error, whoever says it."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from synthquant.core.errors import DataError
from synthquant.core.memory import ran_out


def test_what_allocators_really_raise() -> None:
    pa = pytest.importorskip("pyarrow")
    for allocate in (
        lambda: torch.empty(2**60, dtype=torch.uint8),
        lambda: np.empty(2**60, dtype=np.uint8),
        lambda: bytearray(2**60),
        lambda: pa.allocate_buffer(2**60),
    ):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert ran_out(caught.value) == "main memory"


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (RuntimeError("std::bad_alloc"), "main memory"),
        (
            RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 99"),
            "main memory",
        ),
        (ImportError("libtorch.so: cannot allocate memory in static TLS block"), "main memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "main memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "device memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "device memory"),
        (RuntimeError("can't start new thread"), "main memory or threads"),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (DataError("out of memory is what this message speaks of, not what happened"), None),
    ],
)
def test_what_others_say(error: Exception, place: str | None) -> None:
    assert ran_out(error) == place


def test_an_error_of_ours_that_was_made_from_it() -> None:
    error = DataError("a.parquet is damaged")
    error.__cause__ = MemoryError("malloc of size 99 failed")
    assert ran_out(error) == "main memory"
