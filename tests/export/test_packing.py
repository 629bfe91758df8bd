"""Bit packing against a bit-by-bit loop."""

from __future__ import annotations

import pytest
import torch

from synthquant.export.packing import pack_codes, packed_size, unpack_codes


def pack_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """The layout in its plainest form: one little-endian stream of bits."""
    stream = [code >> bit & 1 for code in codes for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return [sum(stream[start + bit] << bit for bit in range(8)) for start in range(0, len(stream), 8)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 133])
def test_packs_like_the_bit_by_bit_loop_and_back(bits: int, count: int) -> None:
    generator = torch.Generator().manual_seed(bits * 1000 + count)
    codes = torch.randint(0, 2**bits, (count,), generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == pack_bit_by_bit(codes.tolist(), bits)
    assert packed.numel() == packed_size(count, bits)
    assert torch.equal(unpack_codes(packed, bits, (count,)), codes)


def test_largest_codes_of_every_width_survive() -> None:
    for bits in range(1, 9):
        codes = torch.full((3, 5, 3, 3), 2**bits - 1, dtype=torch.uint8)
        assert torch.equal(unpack_codes(pack_codes(codes, bits), bits, (3, 5, 3, 3)), codes)


def test_four_bit_layout_is_low_nibble_first() -> None:
    assert pack_codes(torch.tensor([1, 2, 15], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="codes span 0 to 16, which does not fit 4 unsigned bits"):
        pack_codes(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match="codes span -1 to 3"):
        pack_codes(torch.tensor([-1, 3]), 4)


@pytest.mark.parametrize("bits", [0, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"codes of {bits} bits cannot"):
        pack_codes(torch.zeros(4, dtype=torch.uint8), bits)


def test_unpacking_checks_size_and_dtype() -> None:
    with pytest.raises(ValueError, match=r"needs uint8 of 5 bytes"):
        unpack_codes(torch.zeros(4, dtype=torch.uint8), 4, (3, 3))
    with pytest.raises(ValueError, match=r"packed codes are torch\.float32"):
        unpack_codes(torch.zeros(5), 4, (3, 3))
