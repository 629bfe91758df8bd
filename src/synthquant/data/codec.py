"""One image to bytes and back: PNG for 8-bit colours, `.npy` for others, any common format when reading."""

from __future__ import annotations

import io
import logging
import os
import stat
import struct
import tokenize
import zlib
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

# The plugins of `_FORMATS` register themselves.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from torch import Tensor

from synthquant.core.errors import DataError

# What Pillow logs of damaged files is in our reasons; without a handler it would be on the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())

MOST_PIXELS = 2**31
"""The most that may be allowed."""
MAX_PIXELS = 50_000_000
"""Larger images are set aside: no photograph for a classifier has more, but mistakes, scans and attacks do."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# A limit of pixels means little without one of channels; multispectral images have up to some hundreds.
_MOST_CHANNELS = 1024
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
# What Pillow's readers raise on files of another kind; `Image.open` goes on to the next reader at these.
_OTHER_KIND = (SyntaxError, IndexError, TypeError, struct.error)
# What they raise on damaged files, besides OSError.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
)
_ORIENTATION = 0x0112
# An uncompressed pixel of four 16-bit channels; small limits leave room for metadata.
_BYTES_PER_PIXEL = 8
_BYTES_ALLOWED = 64 * 2**20


class Picture(NamedTuple):
    """A decoded image."""

    image: Tensor
    """`[C,H,W]`, uint8 or float16; RGB if it is a picture."""
    changes: tuple[str, ...]
    """What was done to it beside decoding and writing grey as RGB."""


def encode(image: Tensor) -> bytes:
    """Return the bytes of an image `[C,H,W]`: PNG for uint8 of three channels, else `.npy`.

    Equal images give equal bytes.
    """
    array = image.numpy()
    stream = io.BytesIO()
    if image.dtype == torch.uint8 and len(image) == 3:
        # Level 1: the stores are read far more often than they are moved, and noise hardly compresses.
        Image.fromarray(array.transpose(1, 2, 0).copy()).save(stream, "PNG", compress_level=1)
    else:
        np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def decode(content: bytes | Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """Return the image of a file's bytes or path.

    The size is checked in the header, before any pixel is decoded. Of an animation the first frame is taken; colours
    become RGB, 16-bit values lose their lower half, transparency is dropped, and the image is turned as its EXIF data
    says: `changes` names what happened.

    Raises `DataError` with the reason alone if it is damaged, truncated, larger than `max_pixels` or not an image.
    """
    try:
        if isinstance(content, bytes):
            return _decode(io.BytesIO(content), len(content), max_pixels)
        with regular_file(content).open("rb") as file:
            return _decode(file, os.fstat(file.fileno()).st_size, max_pixels)
    except (OSError, ValueError) as error:  # a path that is too long or holds a null byte is a ValueError
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


def kind_of_file(mode: int) -> str:
    """Return what a file of this `st_mode` is, for a person."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def regular_file(path: Path) -> Path:
    """Return the path itself; raises `DataError` for what is no file: a pipe waits, and a device may never end.

    Raises `OSError` if there is none, `ValueError` if no file can have that name.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise DataError(f"{kind_of_file(mode)}, not a file")
    return path


def _decode(stream: IO[bytes], size: int, max_pixels: int) -> Picture:
    if not size:
        raise DataError("empty: no bytes")
    if size > max(_BYTES_PER_PIXEL * max_pixels, _BYTES_ALLOWED):
        raise DataError(f"too large: {size} bytes for at most {_millions(max_pixels)} million pixels")
    start = stream.read(len(_NPY_MAGIC))
    stream.seek(0)
    if start == _NPY_MAGIC:
        return Picture(_decode_npy(stream, size, max_pixels), ())
    return _decode_picture(stream, max_pixels)


def _decode_picture(stream: IO[bytes], max_pixels: int) -> Picture:
    try:
        with _opened(stream) as picture:
            _check_size(*picture.size, max_pixels)
            changes = _changes(picture)
            turned = _orientation(picture)
            array = rgb(picture)
            # Asked again: Pillow turns some formats itself while loading.
            array = _upright(array, _orientation(picture))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"too large: beyond Pillow's own limit ({error})") from error
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"damaged or truncated: {error or type(error).__name__}") from error
    if turned != 1:
        changes.append("turned as its EXIF data says")
    return Picture(torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))), tuple(changes))


def _opened(stream: IO[bytes]) -> ImageFile.ImageFile:
    """Read the header, as `Image.open` does without its limit on pixels and the warning before it: ours is the one."""
    prefix = stream.read(16)
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(prefix) is True:
            stream.seek(0)
            try:
                return factory(stream, "")
            except _OTHER_KIND:
                continue
    raise DataError("not an image in a known format, or cut short")


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise DataError(f"no pixels: it is {width}x{height}")
    if width * height > max_pixels:
        raise DataError(f"too large: {width}x{height}, the limit is {_millions(max_pixels)} million pixels")


def _changes(picture: ImageFile.ImageFile) -> list[str]:
    """Return what `rgb` will lose or convert, where another reader might do otherwise."""
    mode = picture.mode
    found = {
        "first of several frames": getattr(picture, "is_animated", False),
        "16-bit values cut to 8 bits": mode.startswith("I;16") or ";16" in str(picture.tile),
        "CMYK turned into RGB without its colour profile": mode == "CMYK",
        "palette looked up": mode in ("P", "PA"),
        "transparency dropped": mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info,
    }
    return [change for change, happens in found.items() if happens]


def rgb(picture: Image.Image) -> np.ndarray:
    """Return the colours of a picture of any mode, uint8 `[H, W, 3]`; raises `DataError` if they have no range."""
    if picture.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to 255 instead of scaling it
        grey = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise DataError(f"pixels of {picture.mode!r} type (32 bit) have no known range")
    return np.asarray(picture.convert("RGB"))


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except _DAMAGED:  # damaged metadata say nothing; damaged pixels are found when they are loaded
        return 1
    return value if value in range(1, 9) else 1


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels `[H,W,3]` turned and mirrored as this value of EXIF's Orientation asks."""
    if orientation >= 5:
        array = array.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array


def _decode_npy(stream: IO[bytes], size: int, max_pixels: int) -> Tensor:
    prefix = stream.read(len(_NPY_MAGIC) + 2)
    (length,) = struct.unpack_from("<H", prefix, len(_NPY_MAGIC)) if len(prefix) == len(_NPY_MAGIC) + 2 else (0,)
    shape, dtype = _npy_form(_NPY_MAGIC + prefix[len(_NPY_MAGIC) :] + stream.read(length))
    _check_size(shape[2], shape[1], max_pixels)
    expected = len(prefix) + length + dtype.itemsize * shape[0] * shape[1] * shape[2]
    content = stream.read()
    if size != expected or len(prefix) + length + len(content) != expected:
        raise DataError(f"truncated: {size} bytes where the header promises {expected}")
    # A copy: the tensor must be writable and must not keep the file's bytes alive.
    return torch.from_numpy(np.frombuffer(content, dtype).reshape(shape).copy())


@lru_cache(maxsize=64)  # nearly all images of a set share one header
def _npy_form(start: bytes) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(start[len(_NPY_MAGIC) :]))
    except (*_DAMAGED, tokenize.TokenError, RecursionError, MemoryError) as error:  # it is read as a Python literal
        raise DataError(f"damaged .npy header: {error}") from error
    if fortran_order or dtype not in (np.float16, np.uint8) or len(shape) != 3 or not 1 <= shape[0] <= _MOST_CHANNELS:
        raise DataError(f".npy array is {dtype} {shape}, not float16 or uint8 [channels, height, width]")
    return (shape[0], shape[1], shape[2]), dtype


def _millions(pixels: int) -> str:
    return f"{pixels / 10**6:.6g}"
