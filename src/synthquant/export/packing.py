"""Bit packing: codes of b bits, stored next to each other in bytes.

The layout is one little-endian bit stream: code `i` takes the bits `i * b ... i * b + b - 1`, the lowest first, and bit
`k` of the stream is bit `k % 8` of byte `k // 8`. Eight codes therefore fill exactly `b` bytes, and the last byte is
padded with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 8  # codes per whole number of bytes, whatever the bits


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes `0 ... 2**bits - 1` of any shape into a uint8 tensor `[packed_size(count, bits)]`.

    Raises:
        ValueError: `bits` is not 1 to 8, or a code does not fit.
    """
    _check_bits(bits)
    flat = codes.detach().reshape(-1).cpu()
    if flat.numel() and (int(flat.max()) >= 1 << bits or int(flat.min()) < 0):
        raise ValueError(f"codes span {int(flat.min())} to {int(flat.max())}, which does not fit {bits} unsigned bits")
    if bits == 8:
        return flat.to(torch.uint8)
    count = flat.numel()
    groups = -(-count // _GROUP)
    padded = torch.zeros(groups * _GROUP, dtype=torch.uint8)
    padded[:count] = flat.to(torch.uint8)
    columns = padded.view(groups, _GROUP)
    # bits < 8, so eight codes are at most 56 bits and never touch the sign of the 64-bit word
    words = torch.zeros(groups, dtype=torch.int64)
    for index in range(_GROUP):
        words |= columns[:, index].to(torch.int64) << (index * bits)
    packed = torch.empty(groups, bits, dtype=torch.uint8)
    for index in range(bits):
        packed[:, index] = ((words >> (8 * index)) & 0xFF).to(torch.uint8)
    return packed.view(-1)[: packed_size(count, bits)].clone()


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_codes`: return the uint8 codes with `shape`.

    Raises:
        ValueError: `bits` is not 1 to 8, or `packed` is not a uint8 tensor of the size that `shape` needs.
    """
    _check_bits(bits)
    count = 1
    for size in shape:
        count *= size
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        expected = f"uint8 of {packed_size(count, bits)} bytes"
        raise ValueError(
            f"packed codes are {packed.dtype} {tuple(packed.shape)}, but {bits}-bit {shape} needs {expected}"
        )
    if bits == 8:
        return packed.view(shape).clone()
    groups = -(-count // _GROUP)
    padded = torch.zeros(groups * bits, dtype=torch.uint8)
    padded[: packed.numel()] = packed
    columns = padded.view(groups, bits)
    words = torch.zeros(groups, dtype=torch.int64)
    for index in range(bits):
        words |= columns[:, index].to(torch.int64) << (8 * index)
    codes = torch.empty(groups, _GROUP, dtype=torch.uint8)
    for index in range(_GROUP):
        codes[:, index] = ((words >> (index * bits)) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(-1)[:count].view(shape).clone()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed; 1 to 8 bits can")
