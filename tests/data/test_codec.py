from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from synthquant.core.errors import DataError
from synthquant.data import codec
from synthquant.data.codec import encode


def decode(content: bytes | Path) -> torch.Tensor:
    return codec.decode(content).image


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


def _npy_header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return stream.getvalue()


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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty: no bytes"),
        (b"not an image at all", "not an image in a known format"),
        (_png_of_size(10_001, 5_000), "too large: 10001x5000, the limit is 50 million pixels"),
        (_png_of_size(100_000, 100_000), "too large: 100000x100000"),
        (_npy_header((3, 0, 5)), "no pixels: it is 5x0"),
        (_npy_header((3, 10**5, 10**5)), "too large: 100000x100000"),
        (_npy_header((3, -4, -4)), "no pixels: it is -4x-4"),
        (
            _picture(Image.new("RGB", (3, 2)), "BMP")[:18] + bytes(8) + _picture(Image.new("RGB", (3, 2)), "BMP")[26:],
            "",
        ),
        (_png_of_size(40, 40), "damaged or truncated: "),
        (b"\x93NUMPY\x01\x00", "damaged .npy header"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': oops}\n", "damaged .npy header"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f2',\n", "damaged .npy header"),
        (b"\x93NUMPY\x01\x00\x10\x00{'shape': ((((((\n", "damaged .npy header"),
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

    with pytest.raises(DataError, match=r"\.npy array is float64 \(3, 2, 2\), not float16 or uint8 \[channels, "):
        decode(npy(np.zeros((3, 2, 2))))
    with pytest.raises(DataError, match=r"float16 \(2, 2\)"):
        decode(npy(np.zeros((2, 2), np.float16)))
    with pytest.raises(DataError, match=r"truncated: \d+ bytes where the header promises \d+"):
        decode(encode(noise.half())[:-1])


def test_the_limit_is_a_setting_and_the_only_one(
    recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow has a limit of its own: it warns beyond it, and refuses beyond twice as many pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    content = _picture(Image.new("RGB", (4, 3)))
    assert codec.decode(content, max_pixels=12).image.shape == (3, 3, 4)
    with pytest.raises(DataError, match=r"^too large: 4x3, the limit is 1.1e-05 million pixels$"):
        codec.decode(content, max_pixels=11)
    assert not recwarn.list


def test_more_bytes_than_pixels_need_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"^too large: 1099511627776 bytes for at most 50 million pixels$"):
        codec.decode(tmp_path / "sparse.png")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(noise: torch.Tensor, format_: str, orientation: int) -> None:
    picture, exif, stream = Image.fromarray(noise.permute(1, 2, 0).numpy()), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(stream, format_, exif=exif, lossless=True)
    found = codec.decode(stream.getvalue())
    upright = ImageOps.exif_transpose(Image.open(stream))
    assert torch.equal(found.image, torch.from_numpy(np.array(upright)).permute(2, 0, 1))
    assert found.changes == (() if orientation == 1 else ("turned as its EXIF data says",))


def test_what_a_reader_may_do_in_several_ways_is_said() -> None:
    grey = Image.new("L", (4, 3), 7)
    moving = io.BytesIO()
    grey.save(moving, "GIF", save_all=True, append_images=[Image.new("L", (4, 3), 200)])
    kinds = {
        _picture(Image.new("CMYK", (4, 3), (0, 255, 0, 0)), "TIFF"): [
            "CMYK turned into RGB without its colour profile"
        ],
        _picture(grey.convert("P"), "PNG"): ["palette looked up"],
        _picture(grey.convert("RGBA"), "PNG"): ["transparency dropped"],
        _picture(Image.fromarray(np.full((3, 4), 1801, np.uint16)), "PNG"): ["16-bit values cut to 8 bits"],
        moving.getvalue(): ["first of several frames", "palette looked up"],
        _picture(grey, "PNG"): [],
    }
    found = [codec.decode(content) for content in kinds]
    assert [list(picture.changes) for picture in found] == list(kinds.values())
    assert [int(picture.image[0, 0, 0]) for picture in found] == [255, 7, 7, 7, 7, 7]


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would wait for ever, a device would never end."""
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
    reasons = {
        tmp_path / "pipe.png": "a pipe, not a file",
        tmp_path / "s": "a socket, not a file",
        Path("/dev/zero"): "a device, not a file",
        tmp_path: "a folder, not a file",
        tmp_path / ("n" * 300): "cannot be read: File name too long",
        tmp_path / "a\0b": "cannot be read: embedded null byte",
    }
    for path, reason in reasons.items():
        with pytest.raises(DataError) as caught:
            codec.decode(path)
        assert str(caught.value) == reason


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_do_not_cost_the_image(noise: torch.Tensor) -> None:
    picture, stream = Image.fromarray(noise.permute(1, 2, 0).numpy()), io.BytesIO()
    picture.save(stream, "PNG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert torch.equal(decode(stream.getvalue()), noise)
