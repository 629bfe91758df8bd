"""What a quantized network costs: bytes of its weights and bit operations of one image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from synthquant.nn.coverage import FLOAT_BITS
from synthquant.nn.quant_model import QuantModel


@dataclass(frozen=True)
class Cost:
    """Size and work of a network."""

    size_bytes: int
    """Bytes of everything the network consists of."""
    bit_operations: int
    """Sum over all matrix products of a forward pass, in layers and outside, of multiply-adds times bits of both
    factors, for one image."""

    def row(self) -> dict[str, Any]:
        """Return the columns of the accuracy table in `run.json` that are about cost."""
        return {"size_bytes": self.size_bytes, "bit_operations": self.bit_operations}


def quantized_cost(quant_model: QuantModel) -> Cost:
    """Return the cost of a quantized network.

    The size is that of its tensors in a checkpoint: codes packed at their bits, scales in float32, zero points in one
    byte where they fit, and what is left in float (biases, normalisation, weights outside the scheme) as it is, with
    tensors that stand under several names counted once. How a network was equalised is not counted: it runs without.
    """
    codes = {f"{name}.weight_codes": layer for name, layer in quant_model.layers.items()}
    size, whole = 0, quant_model.whole_numbers
    for name, value in _distinct(quant_model.state()).items():
        layer = codes.get(name)
        if layer is not None and layer.weight_quantizer is not None and not layer.weight_quantizer.unclipped:
            size += (value.numel() * layer.weight_quantizer.num_bits + 7) // 8
        elif name in whole:
            size += value.numel() * _whole_number_bytes(value)
        else:
            size += value.numel() * value.element_size()
    return Cost(size, sum(row.bit_operations for row in quant_model.coverage()))


def float_cost(quant_model: QuantModel) -> Cost:
    """Return the cost of the float network that `quant_model` was made from, at 32 bits."""
    entries = _distinct(quant_model.float_model.module.state_dict()).values()
    size = sum(value.numel() * value.element_size() for value in entries)
    return Cost(size, sum(row.macs for row in quant_model.coverage()) * FLOAT_BITS**2)


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state, one that stands under several names under its first only."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else name
        seen.setdefault((place,), name)
    return {name: state[name] for name in seen.values()}


def _whole_number_bytes(value: Tensor) -> int:
    """1 if all are whole numbers 0..255, else 4."""
    small = (value == value.round()) & (value >= 0) & (value <= 255)
    return 1 if bool(small.all()) else 4
