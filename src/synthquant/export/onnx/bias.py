"""Biases as 32-bit integers.

An integer kernel adds the bias to sums of products of codes, so its scale must be `input scale * weight scale` of each
channel and its zero point 0; runtimes leave a layer with any other scale in float, some without a word. Where the
arithmetic is to stay float, scales are powers of 2 that lose no digit of the bias, and a linear layer subtracts the
negated bias: ONNX Runtime fuses a product and an addition to an integer kernel without looking at the bias' scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from synthquant.export.deploy import LAYER_KEY
from synthquant.export.grids import exact_bias_scale
from synthquant.export.onnx.graph import add_initializer, copy_type
from synthquant.export.presets import Preset
from synthquant.nn.moves import MOVES

_LARGEST = 2**31 - 1


@dataclass(frozen=True)
class _Biased:
    """A bias that is added to a product with a quantized weight."""

    reader: ir.Node
    """The node that adds it."""
    index: int
    """Which input of the reader it is."""
    product: ir.Node
    """The node that multiplies; the reader itself for convolutions."""
    weight: ir.Node
    """The DequantizeLinear of the weight."""
    weight_index: int
    """Which input of the product that is."""


def quantize_biases(model: ir.Model, preset: Preset) -> tuple[str, ...]:
    """Write biases of layers with a quantized weight as the preset wants them.

    Returns the names of layers in which the weight had to be made coarser, because their bias is more than 2**31 steps
    of the integer sums: beside such a bias the digits that are lost do not show in float32 either.
    """
    if preset.bias == "float":
        return ()
    coarser = []
    for found in _biases(model.graph):
        layer = found.weight.metadata_props[LAYER_KEY]
        bias = _array(found.reader.inputs[found.index]).reshape(-1)
        scale = None
        if preset.bias == "accumulator":
            scale = _accumulator_scale(found)
            if scale is None:
                continue  # its input is float: so is its arithmetic, and the bias stays what it is
            scale = np.broadcast_to(scale, bias.shape).astype(np.float64)
            factor = _too_fine(bias, scale)
            if factor is not None:
                _make_coarser(model.graph, found, factor)
                scale = scale * factor
                coarser.append(layer)
        else:
            scale = exact_bias_scale(torch.from_numpy(bias.astype(np.float32))).numpy()
        subtract = preset.bias == "exact" and found.reader.op_type == "Add"
        decoded = _integer_bias(model.graph, found.reader, -bias if subtract else bias, scale, layer)
        if subtract:
            _subtract(model.graph, found, decoded)
        else:
            found.reader.replace_input_with(found.index, decoded)
    return tuple(coarser)


def _biases(graph: ir.Graph) -> list[_Biased]:
    found = []
    for node in graph:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2:
            weight = _weight_node(node.inputs[1])
            if weight is not None and _is_constant(node.inputs[2]):
                found.append(_Biased(node, 2, node, weight, 1))
        elif node.op_type == "Add":
            for index in (0, 1):
                other, bias = node.inputs[1 - index], node.inputs[index]
                product = None if other is None else other.producer()
                if product is None or product.op_type != "MatMul" or not _is_constant(bias):
                    continue
                weight = _weight_node(product.inputs[1])
                if weight is not None and _array(bias).ndim == 1:
                    found.append(_Biased(node, index, product, weight, 1))
    return found


def _weight_node(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of a weight that is read as it is stored."""
    node = None if value is None else value.producer()
    return node if node is not None and LAYER_KEY in node.metadata_props else None


def _accumulator_scale(found: _Biased) -> np.ndarray | None:
    """`input scale * weight scale`, one or `[C]`; none if the input is not quantized or the weight has blocks."""
    value = found.product.inputs[0]
    while value is not None and (node := value.producer()) is not None and node.op_type in MOVES:
        value = node.inputs[0]
    source = None if value is None else value.producer()
    if source is None or source.op_type != "DequantizeLinear" or LAYER_KEY in source.metadata_props:
        return None
    weight_scale = _array(found.weight.inputs[1])
    if weight_scale.ndim > 1:
        return None
    product: np.ndarray = _array(source.inputs[1]).astype(np.float32) * weight_scale.astype(np.float32)
    return product


def _too_fine(bias: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
    """Powers of 2 by which scales must grow for the bias to fit into 32 bits; none if it fits."""
    steps = np.abs(bias.astype(np.float64)) / scale
    if steps.max(initial=0) < _LARGEST:
        return None
    exponent = np.ceil(np.log2(np.maximum(steps / _LARGEST, 1.0)) + 1e-6)
    factor: np.ndarray = np.where(steps < _LARGEST, 1.0, 2.0**exponent)
    return factor


def _make_coarser(graph: ir.Graph, found: _Biased, factor: np.ndarray) -> None:
    """Give this reader a weight of its own, with larger scales in the channels that need them."""
    node = found.weight
    layer = node.metadata_props[LAYER_KEY]
    codes, scale = _array(node.inputs[0]), _array(node.inputs[1])
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    shape = [1] * codes.ndim
    shape[axis % codes.ndim] = -1
    new_scale = (np.broadcast_to(scale, factor.shape) * factor).astype(np.float32)
    new_codes = np.rint(codes / factor.reshape(shape)).astype(codes.dtype)
    inputs = [
        add_initializer(graph, f"{layer}.coarse_codes", new_codes),
        add_initializer(graph, f"{layer}.coarse_scale", new_scale),
        add_initializer(graph, f"{layer}.coarse_zero_point", np.zeros(new_scale.shape, codes.dtype)),
    ]
    new = ir.node("DequantizeLinear", inputs, {"axis": axis}, name=f"{node.name}/coarse")
    new.metadata_props.update(node.metadata_props)
    copy_type(node.outputs[0], new.outputs[0])
    graph.insert_before(found.product, new)
    found.product.replace_input_with(found.weight_index, new.outputs[0])


def _integer_bias(graph: ir.Graph, reader: ir.Node, bias: np.ndarray, scale: np.ndarray, layer: str) -> ir.Value:
    """Integer codes and a DequantizeLinear before `reader`; each reader has its own, even of a shared bias."""
    codes = np.rint(bias.astype(np.float64) / scale).astype(np.int32)
    inputs = [
        add_initializer(graph, f"{layer}.bias_codes", codes),
        add_initializer(graph, f"{layer}.bias_scale", scale.astype(np.float32)),
    ]  # no zero point: it would be zeros, as large as the codes
    node = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{layer}/bias")
    node.outputs[0].shape, node.outputs[0].dtype = ir.Shape(bias.shape), ir.DataType.FLOAT
    graph.insert_before(reader, node)
    return node.outputs[0]


def _subtract(graph: ir.Graph, found: _Biased, negated: ir.Value) -> None:
    """Write an addition as a subtraction of the negated bias."""
    add = found.reader
    node = ir.node("Sub", [found.product.outputs[0], negated], name=f"{add.name}/sub")
    old, new = add.outputs[0], node.outputs[0]
    copy_type(old, new)
    ir.convenience.replace_nodes_and_values(graph, add, [add], [node], [old], [new])


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _array(value: ir.Value | None) -> np.ndarray:
    tensor = None if value is None else value.const_value
    if tensor is None:
        raise TypeError("a constant was expected here")
    return tensor.numpy()
