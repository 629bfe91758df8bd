"""Passes over an exported ONNX graph: everything that the exporter of torch does not say or not do.

Imports onnx_ir, so it is only imported where `onnx.require_onnx` has been asked.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from synthquant.export.deploy import LAYER_KEY, PACKED_KEY

# Where `flat.FlatNetwork` holds the network.
_ROOT = "network."
_SPATIAL = {2, 3}
_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


def merge_duplicates(model: ir.Model) -> None:
    """Let all readers of one quantized tensor share one pair of QuantizeLinear and DequantizeLinear."""
    common.CommonSubexpressionEliminationPass(size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)


def name_nodes(model: ir.Model) -> None:
    """Name every node after the module it was made in."""
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES_KEY, "['']"))
        layer = node.metadata_props.get(LAYER_KEY)
        module = layer or next((scope for scope in reversed(scopes[:-1]) if scope), "").removeprefix(_ROOT)
        node.name = f"{module}/{node.op_type}" if module else node.op_type
    _number_names(model)


def name_ends(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name what the graph takes and gives; each output becomes a value of its own, and others give their names up."""
    graph = model.graph
    seen: set[ir.Value] = set(graph.inputs)
    for index, value in enumerate(list(graph.outputs)):
        if value in seen or value.is_initializer():  # given as it was taken, or twice
            node = ir.node("Identity", [value], name=f"{outputs[index]}/Identity")
            copy_type(value, node.outputs[0])
            graph.append(node)
            graph.outputs[index] = node.outputs[0]
        seen.add(graph.outputs[index])
    ends = [*graph.inputs, *graph.outputs]
    taken = {*inputs, *outputs}
    inner = [value for node in graph for value in node.outputs if value not in seen]
    for value in [*inner, *graph.initializers.values()]:
        if value.name in taken:
            value.name = f"{value.name}_inner"
    for value, name in zip(ends, (*inputs, *outputs), strict=True):
        value.name = name


def _number_names(model: ir.Model) -> None:
    """Give each node a name of its own, with a number behind it from the second of a name on."""
    taken: set[str] = set()
    for node in model.graph:
        name, count = str(node.name), 1
        while node.name in taken:
            count += 1
            node.name = f"{name}_{count}"
        taken.add(str(node.name))


def pool_by_name(model: ir.Model) -> None:
    """Write a mean over height and width as GlobalAveragePool, which runtimes have as an integer operation."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        x, second = node.inputs[0], node.inputs[1]
        axes = None if second is None else ir.convenience.get_const_tensor(second)
        if x is None or axes is None or x.shape is None or x.shape.rank() != 4:
            continue
        if {int(axis) % 4 for axis in axes.numpy().reshape(-1)} != _SPATIAL:
            continue
        pooled = ir.node("GlobalAveragePool", [x], name=f"{node.name}/pool")
        made = [pooled]
        if not _flag(node, "keepdims", default=1):
            made.append(ir.node("Flatten", [pooled.outputs[0]], {"axis": 1}, name=f"{node.name}/flatten"))
            copy_type(x, pooled.outputs[0])
            pooled.outputs[0].shape = ir.Shape([*x.shape[:2], 1, 1])
        for new in made:
            new.metadata_props.update(node.metadata_props)
        old, result = node.outputs[0], made[-1].outputs[0]
        copy_type(old, result)
        ir.convenience.replace_nodes_and_values(graph, node, [node], made, [old], [result])


def pack_weights(model: ir.Model) -> int:
    """Turn the weights that are marked so into 4-bit initialisers; returns how many there were."""
    packed = [node for node in model.graph if node.metadata_props.get(PACKED_KEY) == "4"]
    for node in packed:
        for index in (0, 2):
            value = node.inputs[index]
            tensor = None if value is None else value.const_value
            if value is None or tensor is None or tensor.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
                continue  # zero points of several layers may be one initialiser
            if any(use.node not in packed for use in value.uses()):
                value = add_initializer(model.graph, str(value.name), tensor.numpy())
                node.replace_input_with(index, value)
            dtype = ir.DataType.INT4 if tensor.dtype == ir.DataType.INT8 else ir.DataType.UINT4
            narrow = ir.tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=value.name)
            value.const_value, value.dtype = narrow, dtype
    return len(packed)


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Enter an array as an initialiser of its own, whatever others are called."""
    unique, count = name, 1
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(ir.tensor(array).dtype))
    value.const_value = ir.tensor(array, name=unique)
    graph.register_initializer(value)
    return value


def copy_type(source: ir.Value, target: ir.Value) -> None:
    """Say that a new value has the type and shape of another."""
    target.shape, target.type = source.shape, source.type


def finish(model: ir.Model, *, producer: str, version: str, metadata: Mapping[str, str]) -> None:
    """Take out what torch noted (file paths among it), drop what nothing reads, and sign the file."""
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    _number_names(model)  # passes name what they add after the layer, and a layer may run twice
    for value in list(model.graph.initializers.values()):
        value.name = _own_name(str(value.name))
    model.producer_name, model.producer_version = producer, version
    model.graph.name = "synthquant"
    model.metadata_props.clear()
    model.metadata_props.update(metadata)


def to_bytes(model: ir.Model) -> bytes:
    """The file, without the types of inner values: every runtime infers them, and in a small file they weigh."""
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    data: bytes = proto.SerializeToString()
    return data


def _own_name(name: str) -> str:
    """The name of an initialiser without what export put around the network's own names."""
    for ours, plain in ((".deploy_codes", ".weight_codes"), (".deploy_", ".")):
        name = name.replace(ours, plain)
    return name.removeprefix(_ROOT)


def _flag(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
