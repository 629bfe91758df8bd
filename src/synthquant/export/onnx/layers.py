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

from synthquant.export.onnx.runtime import session

# Kernels that multiply integers, and the float ones that stand in their place where a pattern was not recognised. With
# each the position of its factors.
_INTEGER = {
    **dict.fromkeys(("QLinearConv", "QGemm", "QLinearMatMul"), (0, 3)),
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits"), (0, 1)),
    **dict.fromkeys(("DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention"), (0, 1)),
}
_FLOAT = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "DeformConv"), (0, 1)),
    **dict.fromkeys(("Gemm", "FusedGemm", "MatMul", "FusedMatMul", "FusedMatMulActivation", "Einsum"), (0, 1)),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "Attention", "MultiHeadAttention"), (0, 1)),
}


@dataclass(frozen=True)
class IntegerCoverage:
    """How a file runs.

    Attributes:
        operators: how often each operator is in the optimised graph.
        integer: nodes that multiply with a weight and run on integers.
        floating: those that run in float. A weight is all that does not depend on the images, computed or not.
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
    """Count the nodes of a graph that multiply."""
    stored = {tensor.name for tensor in graph.initializer}
    of_images = {value.name for value in graph.input if value.name not in stored}
    counts: Counter[tuple[bool, bool]] = Counter()
    float_layers = []
    for node in graph.node:
        if of_images.intersection(node.input):
            of_images.update(node.output)
        factors = _INTEGER.get(node.op_type) or _FLOAT.get(node.op_type)
        if factors is None or len(node.input) <= max(factors):  # an Einsum of one tensor multiplies nothing
            continue
        is_integer = node.op_type in _INTEGER
        has_weight = not of_images.issuperset(node.input[index] for index in factors)
        counts[has_weight, is_integer] += 1
        if has_weight and not is_integer:
            float_layers.append(node.name)
    return IntegerCoverage(
        operators=dict(Counter(node.op_type for node in graph.node).most_common()),
        integer=counts[True, True],
        floating=counts[True, False],
        float_layers=tuple(float_layers),
        products_integer=counts[False, True],
        products_floating=counts[False, False],
    )
