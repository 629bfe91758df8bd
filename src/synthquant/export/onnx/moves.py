"""Move codes, not floats: reshaping, transposing and slicing of quantized tensors on the integers themselves.

ONNX Runtime recognises an integer kernel by a DequantizeLinear right before it. Operations that only move values stand
between the two in transformers (heads, windows, the class token), and the kernel after them would stay in float.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from synthquant.export.deploy import LAYER_KEY
from synthquant.export.onnx.graph import copy_type

# The moves (nn.moves) for which ONNX Runtime has kernels that move bytes.
BYTE_MOVES = frozenset(
    ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Pad")
)


def undo_joins(model: ir.Model) -> int:
    """Let readers of the pieces of a concatenation read what was joined, where that is the same; returns how many are.

    Split layers (`nn.split_shortcuts`) cut concatenations, and a kernel behind the cut would not see the code.
    """
    graph, count = model.graph, 0
    for node in list(graph):
        joined = node.inputs[0].producer() if node.op_type == "Split" and node.inputs[0] is not None else None
        if joined is None or joined.op_type != "Concat":
            continue
        parts = [value for value in joined.inputs if value is not None]
        if _shapes(parts) is not None and _shapes(parts) == _shapes(list(node.outputs)):
            ir.convenience.replace_all_uses_with(list(node.outputs), parts)
            graph.remove(node)
            count += 1
    common.RemoveUnusedNodesPass()(model)
    return count


def _shapes(values: list[ir.Value]) -> list[list[int | str]] | None:
    """The shapes of values, sizes that vary as text; none if one is unknown."""
    known = [[size if isinstance(size, int) else str(size) for size in one.shape] for one in values if one.shape]
    return known if len(known) == len(values) else None


def move_codes(model: ir.Model) -> int:
    """Put each DequantizeLinear of an activation behind the operations that only move values; returns how many moved.

    What else reads the float tensor keeps its own DequantizeLinear.
    """
    count = 0
    for node in list(model.graph):
        grid = _shared_grid(_moved(node))
        if grid is not None and _zero_padding(node):
            _move(model.graph, node, grid)
            count += 1
    return count


def _moved(node: ir.Node) -> list[ir.Value | None]:
    """The inputs whose values the operation moves; none for other operations."""
    if node.op_type == "Concat":
        return list(node.inputs)
    if node.op_type in BYTE_MOVES:
        return [node.inputs[0]]
    return []


def _shared_grid(values: list[ir.Value | None]) -> ir.Node | None:
    """The DequantizeLinear of an activation behind all these values, if they share scale and zero point."""
    found = None
    for value in values:
        node = None if value is None else value.producer()
        if node is None or node.op_type != "DequantizeLinear" or LAYER_KEY in node.metadata_props:
            return None
        if node.inputs[0] is None or node.inputs[0].const_value is not None:
            return None
        if found is not None and tuple(found.inputs[1:]) != tuple(node.inputs[1:]):
            return None
        found = node
    return found


def _zero_padding(node: ir.Node) -> bool:
    """Whether the operation, if it pads, pads with zeros, for which there is a code."""
    if node.op_type != "Pad":
        return True
    mode = node.attributes.get("mode")
    value = node.inputs[2] if len(node.inputs) > 2 else None
    constant = None if value is None or value.const_value is None else value.const_value.numpy()
    is_zero = value is None or (constant is not None and not constant.any())
    return (mode is None or mode.as_string() == "constant") and is_zero


def _move(graph: ir.Graph, node: ir.Node, grid: ir.Node) -> None:
    """Let a node move codes and decode what it gives."""
    zero_point = grid.inputs[2]
    count = len(_moved(node))
    inputs = [value.producer().inputs[0] for value in node.inputs[:count]]  # type: ignore[union-attr]  # as found above
    inputs += node.inputs[count:]
    if node.op_type == "Pad":
        inputs = [*inputs[:2], zero_point, *inputs[3:]]
    moved = ir.node(node.op_type, inputs, dict(node.attributes), num_outputs=len(node.outputs), name=node.name)
    moved.metadata_props.update(node.metadata_props)
    made = [moved]
    for old, codes in zip(node.outputs, moved.outputs, strict=True):
        decode = ir.node("DequantizeLinear", [codes, *grid.inputs[1:]], name=f"{old.name}/DequantizeLinear")
        codes.shape = old.shape
        codes.type = None if inputs[0] is None else inputs[0].type
        copy_type(old, decode.outputs[0])
        made.append(decode)
    new = [decode.outputs[0] for decode in made[1:]]
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, list(node.outputs), new)
