"""Compare an ONNX file with the quantized network it was made from.

ONNX Runtime runs it twice: as it is written, where only float rounding differs, and with the integer kernels that it
puts in, where every requantisation may differ by a step.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from synthquant.core.cpu import has_vnni
from synthquant.core.errors import VerificationError
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.export.compare import require_close, row, run_beside
from synthquant.export.flat import FlatFunction
from synthquant.export.onnx.layers import integer_coverage
from synthquant.export.onnx.runtime import ort_function, session
from synthquant.models.samples import Samples
from synthquant.nn.quant_model import QuantModel

_NO_VNNI = (
    "this CPU has no VNNI and adds two 8-bit products in 16 bits, where they may overflow: quantize with --scheme W7A8"
    " --set scheme.ends=same; "
)
_TITLES = {"as_written": "ONNX Runtime without optimisation", "optimized": "ONNX Runtime"}


def verify_onnx(
    quant_model: QuantModel,
    path: Path,
    images: ImageSet | Samples,
    *,
    count: int,
    min_agreement: float,
    max_mean_error: float,
    progress: Progress = QUIET,
) -> dict[str, Any]:
    """Check the file and measure both ways of running it.

    Args:
        quant_model: what the file was made from.
        path: the file.
        images: labels are not needed; or samples of what else the network takes.
        count: how many to use, evenly spaced over the set.
        min_agreement: share of images that must keep their top class, of which one may always differ; and of whole
            numbers that must be the same.
        max_mean_error: mean difference of an output that is allowed, as a share of its standard deviation.
        progress: draws a bar.

    Returns:
        `images` (of other sets `samples`), `as_written` and `optimized` (fields of `Difference`, for several outputs by
        name under `outputs`) and `layers` (fields of `IntegerCoverage`).

    Raises:
        VerificationError: ONNX's checker refuses the file, or a difference is larger than allowed.
        DataError: no sample could be read.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the file is not valid ONNX: {error}") from error
    networks: dict[str, FlatFunction] = {
        "as_written": ort_function(session(path, optimized=False)),
        "optimized": ort_function(session(path)),
    }
    beside = run_beside(quant_model, networks, images, count, progress)
    steps = _output_steps(path)
    differences = {name: beside.differences(name, steps) for name in networks}
    for name, found in differences.items():
        advice = _NO_VNNI if name == "optimized" and not has_vnni() else ""
        require_close(found, _TITLES[name], beside.count, min_agreement, max_mean_error, advice)
    coverage = integer_coverage(path)
    return {
        beside.noun: beside.count,
        **{name: row(found) for name, found in differences.items()},
        "layers": {**asdict(coverage), "share": coverage.share},
    }


def _output_steps(path: Path) -> dict[str, float]:
    """The scales of the grids of outputs, of those whose last node decodes one."""
    graph, steps = onnx.load(str(path)).graph, {}
    scales = {tensor.name: tensor for tensor in graph.initializer}
    decoded = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    for output in graph.output:
        scale = scales.get(decoded.get(output.name, ""))
        if scale is not None:
            steps[output.name] = float(onnx.numpy_helper.to_array(scale))
    return steps
