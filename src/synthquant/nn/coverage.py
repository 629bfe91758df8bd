"""What quantization reaches of a network: every weight, every matrix product and all that joins tensors in a pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import cast

from torch import nn

from synthquant.core.modules import get_module
from synthquant.models.operation_names import QUANTIZABLE
from synthquant.models.products import Product
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.equalization import ChannelClip
from synthquant.nn.layers import QuantLayer
from synthquant.nn.placement import OperationRow
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.weight_sources import WeightSource

_NAMED = 5
_OUTSIDE = "computed outside of layers"
FLOAT_BITS = 32
"""Bits that a float factor counts for, whatever its type."""


@dataclass(frozen=True)
class CoverageRow:
    """What quantization does to one layer, or to a weight, a matrix product or another operation outside of layers.

    Attributes:
        name: module name of a layer, name of a parameter that a function uses, or place of an operation (module and
            function).
        kind: class name of the float layer, `Parameter`, or name of the function.
        weight_bits: bits of a weight code, none for a float weight; of an operation on several tensors of data the
            fewest of those behind the first, none if one of them is float.
        input_bits: bits of the tensor it reads, or none for a float input.
        parameters: number of weights.
        macs: multiply-adds for one image.
        reason: why it is not quantized; empty if it is.
        input_kind: kind of the quantizer of the tensor it reads, or none for a float input; of a product of two tensors
            both kinds if they differ.
        output_bits: bits of what an operation puts out, behind a fused activation; none if it has no grid there.
    """

    name: str
    kind: str
    weight_bits: int | None
    input_bits: int | None
    parameters: int
    macs: int
    reason: str = ""
    input_kind: str | None = None
    output_bits: int | None = None

    @property
    def bit_operations(self) -> int:
        """Multiply-adds times bits of both factors, for one image."""
        return self.macs * (self.weight_bits or FLOAT_BITS) * (self.input_bits or FLOAT_BITS)


@dataclass(frozen=True)
class CoverageSummary:
    """The coverage of a network in numbers; shares are 0..1.

    Attributes:
        layers: layers and other weights that multiply.
        quantized_layers: those of them whose weight is quantized.
        weights: share of the weights that are quantized. Weights are parameters of two or more dimensions.
        multiply_adds: share of the multiply-adds of one image that have quantized weights, or two quantized tensors.
        floating: the others by name with their share, largest first.
    """

    layers: int
    quantized_layers: int
    weights: float
    multiply_adds: float
    floating: dict[str, float]

    def __str__(self) -> str:
        """One line: what is quantized."""
        return (
            f"quantized: {self.quantized_layers} of {self.layers} layers, {_percent(self.weights)} of weights,"
            f" {_percent(self.multiply_adds)} of multiply-adds"
        )

    @property
    def in_float(self) -> str:
        """One line: what stays in float, with its share of multiply-adds; empty if nothing does."""
        if not self.floating:
            return ""
        named = [f"{name} {_percent(share)}" for name, share in list(self.floating.items())[:_NAMED]]
        more = len(self.floating) - len(named)
        end = f" and {more} more" if more else ""
        return f"in float, with their share of multiply-adds: {', '.join(named)}{end}"


def summarize(rows: Iterable[CoverageRow]) -> CoverageSummary:
    """Add up the rows of a network."""
    rows = list(rows)
    layers = [row for row in rows if row.macs and row.parameters]
    macs, weights = sum(row.macs for row in rows), sum(row.parameters for row in rows)
    quantized = [row for row in rows if row.weight_bits is not None]
    floating = sorted((row for row in rows if row.macs and row.weight_bits is None), key=lambda row: -row.macs)
    return CoverageSummary(
        layers=len(layers),
        quantized_layers=sum(row.weight_bits is not None for row in layers),
        weights=sum(row.parameters for row in quantized) / weights if weights else 0.0,
        multiply_adds=sum(row.macs for row in quantized) / macs if macs else 0.0,
        floating={row.name: row.macs / macs for row in floating},
    )


def coverage_rows(
    module: nn.Module,
    products: Sequence[Product],
    layers: Mapping[str, QuantLayer],
    reads: Mapping[str, QuantArgs],
    operations: Sequence[OperationRow],
) -> list[CoverageRow]:
    """One row for each layer, other weight, and product without a weight, in execution order, and the rest behind.

    The rest are the other operations that read several tensors of data or have a grid, in execution order, and clips.

    Args:
        module: the network with its quantized layers.
        products: its matrix products.
        layers: quantized layers by name.
        reads: how the tensor that a layer reads is quantized, by layer.
        operations: what becomes of operations outside of layers.
    """
    kept = {row.name: row for row in operations}
    candidates = {name: part for name, part in module.named_modules() if isinstance(part, QUANTIZABLE)}
    executed = {product.layer for product in products}
    groups: dict[str, list[Product]] = {}
    for product in products:
        groups.setdefault(_row_name(product, candidates, executed), []).append(product)
    rows = []
    for name, group in groups.items():
        macs = sum(product.macs for product in group)
        if name in candidates:
            rows.append(_layer_row(module, name, group, layers.get(name), reads.get(name), macs))
        else:
            rows.append(_other_row(name, group[0], layers, kept, macs))
    idle = [name for name in candidates if name not in groups]
    rows += [_layer_row(module, name, [], layers.get(name), None, 0) for name in idle]
    others = [row for row in operations if row.name not in groups]
    return [*_with_weights(rows, module, candidates), *_operation_rows(others), *_clip_rows(module)]


def _row_name(product: Product, candidates: Collection[str], executed: Collection[str | None]) -> str:
    """The layer a product runs in, else the weight it reads, else its place."""
    if product.layer is not None:
        of_layer = f"{product.layer}.weight" in product.weights
        extra = [name for name in product.weights if name.startswith(f"{product.layer}.")]
        return product.layer if of_layer or not extra else extra[0]  # a subclass with further weights
    if not product.weights:
        return product.place
    layer = product.weights[0].removesuffix(".weight")
    # A layer that runs as well has a row of its own, with other bits.
    return layer if layer in candidates and layer not in executed else product.weights[0]


def _layer_row(
    module: nn.Module,
    name: str,
    products: Sequence[Product],
    layer: QuantLayer | None,
    reads: QuantArgs | None,
    macs: int,
) -> CoverageRow:
    part = get_module(module, name)
    kind = (type(part).__bases__[1] if isinstance(part, QuantLayer) else type(part)).__name__
    quantizer = None if layer is None else layer.weight_quantizer
    weight_bits = None if quantizer is None else quantizer.num_bits
    reason = ""
    if not any(product.layer == name for product in products):
        reason = "its forward is never called" + (", a function uses its weight" if products else "")
    elif layer is None:
        reason = "left out by the scheme"
    elif weight_bits is not None and not any(f"{name}.weight" in product.weights for product in products):
        weight_bits, reason = None, "multiplies in float, with a weight computed from the quantized one"
    parameters = cast(nn.Linear, part).weight.numel() if quantizer is None else quantizer.codes.numel()
    bits, input_kind = (None, None) if reads is None else (reads.num_bits, reads.kind)
    return CoverageRow(name, kind, weight_bits, bits, parameters, macs, reason, input_kind)


def _other_row(
    name: str, product: Product, layers: Mapping[str, QuantLayer], kept: Mapping[str, OperationRow], macs: int
) -> CoverageRow:
    """A product outside of layers: of a weight, or of two tensors of data."""
    if not product.weights:
        row = kept.get(product.place)
        first, second = (*(row.input_bits if row else ()), None, None)[:2]
        if row is None or first is None or second is None:
            return CoverageRow(name, product.function, None, None, 0, macs, _OUTSIDE)
        return CoverageRow(name, product.function, second, first, 0, macs, input_kind=" and ".join(row.input_kinds))
    layer = layers.get(name.removesuffix(".weight"))
    if layer is not None and layer.weight_quantizer is not None:
        bits = layer.weight_quantizer.num_bits
        return CoverageRow(name, product.function, bits, None, 0, macs, "a function reads it too, with a float input")
    return CoverageRow(name, product.function, None, None, 0, macs, "a function uses it, and no layer")


def _with_weights(
    rows: Sequence[CoverageRow], module: nn.Module, candidates: Mapping[str, nn.Module]
) -> Iterator[CoverageRow]:
    """The rows, with the numbers of weights outside of layers, and rows for the weights that have none yet."""
    owned = {id(part._parameters.get("weight")) for part in candidates.values()}
    quantization = (part for part in module.modules() if isinstance(part, ActivationQuantizer | WeightSource))
    owned |= {id(parameter) for part in quantization for parameter in part.parameters()}
    inside = tuple(f"{name}.parametrizations." for name in candidates)  # the row of the layer stands for these
    free = {
        name: value.numel()
        for name, value in module.named_parameters()
        if value.ndim > 1 and id(value) not in owned and not name.startswith(inside)
    }
    for row in rows:
        count = free.pop(row.name, None)
        yield row if count is None else CoverageRow(**{**asdict(row), "kind": "Parameter", "parameters": count})
    for name, count in free.items():
        yield CoverageRow(name, "Parameter", None, None, count, 0, "no matrix product reads it as it is")


def _operation_rows(operations: Iterable[OperationRow]) -> Iterator[CoverageRow]:
    """Rows for operations that multiply no matrices."""
    for row in operations:
        grids = [*row.input_bits, row.output_bits]
        if len(row.input_bits) < 2 and not any(grids) and not row.reason:
            continue
        first, *rest = row.input_bits
        second = min((bits for bits in rest if bits is not None), default=None) if None not in rest else None
        reason = row.reason or ("" if row.output_bits or None not in row.input_bits else _OUTSIDE)
        kinds = " and ".join(row.input_kinds) or None
        yield CoverageRow(row.name, row.kind, second, first, 0, 0, reason, kinds, row.output_bits)


def _clip_rows(module: nn.Module) -> Iterator[CoverageRow]:
    """Rows for what equalisation made of clips; they multiply nothing."""
    for name, part in module.named_modules():
        if isinstance(part, ChannelClip):
            yield CoverageRow(name, "ChannelClip", None, None, 0, 0, "equalised: each channel has a bound of its own")


def _percent(share: float) -> str:
    """A share in percent; what is not all of it is never rounded to 100."""
    return f"{100 * share if share == 1 else min(100 * share, 99.9):.1f}%"
