"""What ONNX Runtime makes of a file: which layers end up in integer kernels.

Read from the graph that the runtime writes after its own optimisation, because nothing in a file tells whether a
pattern will be recognised.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from synthquant.export.onnx_runtime import session

# Kernels that multiply integers, and the float ones that stand in their place where a pattern was not recognised.
_INTEGER = frozenset(
    ("QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits")
)
_FLOAT = frozenset(("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"))
_DECODES = frozenset(("DequantizeLinear", "Transpose", "Reshape", "Identity", "Cast", "ReorderInput"))


@dataclass(frozen=True)
class IntegerCoverage:
    """How a file runs.

    Attributes:
        operators: how often each operator is in the optimised graph.
        integer: multiplications with a weight that run on integers.
        floating: those that run in float.
        float_layers: names of the nodes that run in float, as the runtime calls them.
        products_integer: products of two activations (attention) that run on integers.
        products_floating: those that run in float.
    """

    operators: dict[str, int]
    integer: int
    floating: int
    float_layers: tuple[str, ...]
    products_integer: int
    products_floating: int

    @property
    def share(self) -> float:
        """Share (0..1) of the layers with weights that run on integers."""
        total = self.integer + self.floating
        return self.integer / total if total else 0.0


def integer_coverage(path: Path) -> IntegerCoverage:
    """Let ONNX Runtime optimise a file and count what it runs; raises `ModelError` if it cannot load it."""
    with TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session(path, write_optimized=optimized)
        graph = onnx.load(str(optimized)).graph
    return count_layers(graph)


def count_layers(graph: onnx.GraphProto) -> IntegerCoverage:
    """Count the layers of a graph."""
    constants = {tensor.name for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    integer = floating = products_integer = products_floating = 0
    float_layers = []
    for node in graph.node:
        if node.op_type not in _INTEGER and node.op_type not in _FLOAT:
            continue
        is_integer = node.op_type in _INTEGER
        if _has_weight(node, constants, producers):
            integer, floating = integer + is_integer, floating + (not is_integer)
            if not is_integer:
                float_layers.append(node.name)
        else:
            products_integer += is_integer
            products_floating += not is_integer
    return IntegerCoverage(
        dict(Counter(node.op_type for node in graph.node).most_common()),
        integer,
        floating,
        tuple(float_layers),
        products_integer,
        products_floating,
    )


def _has_weight(node: onnx.NodeProto, constants: set[str], producers: dict[str, onnx.NodeProto]) -> bool:
    """Whether the second factor is a constant, decoded or not."""
    index = 3 if node.op_type in ("QLinearConv", "QLinearMatMul", "QGemm") else 1
    name = node.input[index]
    while name not in constants:
        producer = producers.get(name)
        if producer is None or producer.op_type not in _DECODES:
            return False
        name = producer.input[0]
    return True
