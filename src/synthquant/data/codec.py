"""One image to bytes and back: PNG for 8-bit pixels, `.npy` for 16-bit floats, any common format when reading."""

from __future__ import annotations

import io
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from synthquant.core.errors import DataError

MAX_PIXELS = 100_000_000
"""Larger images are set aside: they are not photographs but mistakes, or attacks on the memory."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
# What Pillow's readers raise on damaged files, besides OSError.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


def encode(image: Tensor) -> bytes:
    """Return the bytes of an image `[3,H,W]`: PNG for uint8, `.npy` for float16. Equal images give equal bytes."""
    array = image.numpy()
    stream = io.BytesIO()
    if image.dtype == torch.uint8:
        # Level 1: the stores are read far more often than they are moved, and noise hardly compresses.
        Image.fromarray(array.transpose(1, 2, 0).copy()).save(stream, "PNG", compress_level=1)
    else:
        np.lib.format.write_array(stream, np.ascontiguousarray(array, np.float16), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def decode(content: bytes | Path) -> Tensor:
    """Return the image `[3,H,W]`, uint8 RGB or float16, of a file's bytes or path.

    Raises `DataError` with the reason alone if it is damaged, truncated, too large or not an image.
    """
    if isinstance(content, Path):
        try:
            content = content.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}") from error
    if not content:
        raise DataError("empty: no bytes")
    return _decode_npy(content) if content.startswith(_NPY_MAGIC) else _decode_picture(content)


def _decode_picture(content: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise DataError(_too_large(f"{width}x{height}"))
            array = _rgb(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(_too_large("beyond Pillow's own limit")) from error
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("not an image in a known format, or cut short") from error
    except _DAMAGED as error:
        raise DataError(f"damaged or truncated: {error}") from error
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))


def _rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to 255 instead of scaling it
        grey = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise DataError(f"pixels of {picture.mode!r} type (32 bit) have no known range")
    return np.asarray(picture.convert("RGB"))


def _decode_npy(content: bytes) -> Tensor:
    (length,) = struct.unpack_from("<H", content, len(_NPY_MAGIC)) if len(content) >= 10 else (0,)
    start = len(_NPY_MAGIC) + 2 + length
    shape = _npy_shape(content[len(_NPY_MAGIC) : start])
    expected = start + 2 * shape[0] * shape[1] * shape[2]
    if len(content) != expected:
        raise DataError(f"truncated: {len(content)} bytes where the header promises {expected}")
    # A copy: the tensor must be writable and must not keep the file's bytes alive.
    return torch.from_numpy(np.frombuffer(content, np.float16, offset=start).reshape(shape).copy())


@lru_cache(maxsize=64)  # nearly all images of a set share one header
def _npy_shape(header: bytes) -> tuple[int, int, int]:
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    except (ValueError, EOFError) as error:
        raise DataError(f"damaged .npy header: {error}") from error
    if fortran_order or dtype != np.float16 or len(shape) != 3 or shape[0] != 3:
        raise DataError(f".npy array is {dtype} {shape}, not float16 [3, height, width]")
    if shape[1] * shape[2] > MAX_PIXELS:
        raise DataError(_too_large(f"{shape[2]}x{shape[1]}"))
    return shape[0], shape[1], shape[2]


def _too_large(size: str) -> str:
    return f"too large: {size}, the limit is {MAX_PIXELS // 10**6} million pixels"
