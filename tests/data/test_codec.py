from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synthquant.core.errors import DataError
from synthquant.data.codec import decode, encode


def _picture(picture: Image.Image, format_: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format_)
    return stream.getvalue()


def _png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises a size that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_uint8_round_trip_is_exact(noise: torch.Tensor) -> None:
    image = decode(encode(noise))
    assert image.dtype == torch.uint8
    assert torch.equal(image, noise)


def test_float16_round_trip_keeps_every_bit() -> None:
    image = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)).half()
    image[0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, 65504.0])
    back = decode(encode(image))
    assert back.dtype == torch.float16
    assert torch.equal(back.view(torch.int16), image.view(torch.int16))


def test_strided_images_are_encoded_as_seen(noise: torch.Tensor) -> None:
    turned = noise.permute(0, 2, 1)
    assert torch.equal(decode(encode(turned)), turned)
    assert torch.equal(decode(encode(turned.half())), turned.half())


def test_equal_images_give_equal_bytes(noise: torch.Tensor) -> None:
    assert encode(noise) == encode(noise.clone())
    assert encode(noise.half()) == encode(noise.half().clone())


def test_what_is_decoded_can_be_written_to(noise: torch.Tensor) -> None:
    for image in (decode(encode(noise)), decode(encode(noise.half()))):
        image += 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    picture = Image.new("RGB", (4, 3), (200, 200, 200)).convert(mode)
    image = decode(_picture(picture, "TIFF"))
    assert image.shape == (3, 3, 4)
    assert torch.equal(image, torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1))


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.array([[0, 255, 256, 65535]], np.uint16)
    image = decode(_picture(Image.fromarray(grey)))
    assert image[0].tolist() == [[0, 0, 1, 255]]


def test_files_are_read(tmp_path: Path, noise: torch.Tensor) -> None:
    (tmp_path / "a.png").write_bytes(encode(noise))
    assert torch.equal(decode(tmp_path / "a.png"), noise)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        decode(tmp_path / "none.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty: no bytes"),
        (b"not an image at all", "not an image in a known format"),
        (_png_of_size(10_001, 10_000), "too large: 10001x10000, the limit is 100 million pixels"),
        (_png_of_size(100_000, 100_000), "too large: "),
        (_png_of_size(40, 40), "damaged or truncated: "),
        (b"\x93NUMPY\x01\x00", "damaged .npy header"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': oops}\n", "damaged .npy header"),
    ],
)
def test_broken_bytes_give_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        decode(content)
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_truncated_pictures_give_a_reason(noise: torch.Tensor, format_: str) -> None:
    big = noise.permute(1, 2, 0).repeat(20, 20, 1).numpy()
    content = _picture(Image.fromarray(big), format_)
    assert decode(content).shape == (3, 100, 140)
    for size in (10, 30, len(content) // 2, len(content) * 9 // 10):
        with pytest.raises(DataError):
            decode(content[:size])


def test_damaged_bytes_never_escape_as_another_error(noise: torch.Tensor) -> None:
    content = bytearray(_picture(Image.fromarray(noise.permute(1, 2, 0).repeat(4, 4, 1).numpy()), "PNG"))
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        damaged = bytearray(content)
        for place in torch.randint(0, len(content), (3,), generator=generator).tolist():
            damaged[place] ^= 0x55
        try:
            decode(bytes(damaged))
        except DataError as error:
            assert str(error)


def test_npy_of_another_kind_is_refused(noise: torch.Tensor) -> None:
    def npy(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()

    with pytest.raises(DataError, match=r"\.npy array is float64 \(3, 2, 2\), not float16 \[3, height, width\]"):
        decode(npy(np.zeros((3, 2, 2))))
    with pytest.raises(DataError, match=r"float16 \(2, 2, 3\)"):
        decode(npy(np.zeros((2, 2, 3), np.float16)))
    with pytest.raises(DataError, match=r"truncated: \d+ bytes where the header promises \d+"):
        decode(encode(noise.half())[:-1])
