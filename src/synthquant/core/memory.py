"""Telling that memory ran out from all other errors: every library says it in its own way."""

from __future__ import annotations

import errno
from typing import Literal

from synthquant.core.errors import SynthquantError

# What RuntimeErrors of PyTorch, exceptions of ONNX Runtime, of the C++ library and of the loader say, in lower case.
_SIGNS = (
    *("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory"),
    *(
        "failed to allocate memory",
        "bad_alloc",
        "bad allocation",
        "alloc_failed",
        "storage size calculation overflowed",
    ),
)
# What Python says where the system gives it no more threads, which it does not tell from memory.
_NO_THREAD = "can't start new thread"
_DEVICES = ("cuda", "cublas", "cudnn", "hip ", "xpu", "mps")


def ran_out(error: BaseException) -> Literal["main memory", "device memory", "main memory or threads"] | None:
    """Return which memory ran out if that is what an error says, or what an error of ours was made from says.

    NumPy's and Arrow's own errors are `MemoryError`s; PyTorch's main-memory allocator raises a plain `RuntimeError`.
    """
    if isinstance(error, SynthquantError):
        return None if error.__cause__ is None else ran_out(error.__cause__)
    text = str(error).lower()
    if isinstance(error, RuntimeError) and _NO_THREAD in text:
        return "main memory or threads"
    of_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (isinstance(error, MemoryError) or of_system or any(sign in text for sign in _SIGNS)):
        return None
    return "device memory" if any(device in text for device in _DEVICES) else "main memory"
