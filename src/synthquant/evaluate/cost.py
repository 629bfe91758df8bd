"""What a quantized network costs: bytes of its weights and bit operations of one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.data.image_set import ImageSet
from synthquant.methods import METRICS
from synthquant.nn.quant_model import QuantModel

_FLOAT_BITS = 32


@dataclass(frozen=True)
class Cost:
    """Size and work of a network."""

    size_bytes: int
    """Bytes of everything the network consists of."""
    bit_operations: int
    """Sum over convolutions and linear layers of multiply-accumulates times weight bits times input bits, for one
    image."""

    def row(self) -> dict[str, Any]:
        """Return the columns of the accuracy table in `run.json` that are about cost."""
        return {"size_bytes": self.size_bytes, "bit_operations": self.bit_operations}


@METRICS.register("cost")
class CostMetric(Settings):
    """Bytes of the network and bit operations of one image."""

    def measure(self, quant_model: QuantModel, images: ImageSet, *, progress: Progress = QUIET) -> dict[str, float]:
        """Return `size_bytes` and `bit_operations`; the images do not matter."""
        return quantized_cost(quant_model).row()


def quantized_cost(quant_model: QuantModel) -> Cost:
    """Return the cost of a quantized network.

    The size is that of its tensors in a checkpoint: codes packed at their bits, scales in float32, zero points in one
    byte where they fit, and what is left in float (biases, normalisation, layers outside the scheme) as it is.
    """
    codes = {f"{name}.weight_codes": layer for name, layer in quant_model.layers.items()}
    size = 0
    for name, value in quant_model.state().items():
        layer = codes.get(name)
        if layer is not None and layer.weight_quantizer is not None:
            size += (value.numel() * layer.weight_quantizer.num_bits + 7) // 8
        elif name.endswith("zero_point"):
            size += value.numel() * _zero_point_bytes(value)
        else:
            size += value.numel() * value.element_size()
    operations = sum(
        row.macs * (row.weight_bits or _FLOAT_BITS) * (row.input_bits or _FLOAT_BITS) for row in quant_model.coverage()
    )
    return Cost(size, operations)


def float_cost(quant_model: QuantModel) -> Cost:
    """Return the cost of the float network that `quant_model` was made from, at 32 bits."""
    entries = quant_model.float_model.module.state_dict().values()
    size = sum(value.numel() * value.element_size() for value in entries)
    return Cost(size, sum(row.macs for row in quant_model.coverage()) * _FLOAT_BITS**2)


def _zero_point_bytes(zero_point: Tensor) -> int:
    """1 if all zero points are whole numbers 0..255, else 4."""
    small = (zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= 255)
    return 1 if bool(small.all()) else 4
