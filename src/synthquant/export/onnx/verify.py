"""Compare an ONNX file with the quantized network it was made from.

ONNX Runtime runs it twice: as it is written, where only float rounding differs, and with the integer kernels that it
puts in, where every requantisation may differ by a step.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from synthquant.core.errors import VerificationError
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.export.compare import Network, difference, require_close, run_beside
from synthquant.export.onnx.layers import integer_coverage
from synthquant.export.onnx.runtime import has_vnni, ort_network, session
from synthquant.nn.quant_model import QuantModel

_NO_VNNI = (
    "this CPU has no VNNI and adds two 8-bit products in 16 bits, where they may overflow: quantize with --scheme W7A8"
    " --set scheme.ends=same; "
)
_TITLES = {"as_written": "ONNX Runtime without optimisation", "optimized": "ONNX Runtime"}


def verify_onnx(
    quant_model: QuantModel,
    path: Path,
    images: ImageSet,
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
        images: labels are not needed.
        count: how many images to use, evenly spaced over the set.
        min_agreement: share of images that must keep their top class; one image may always differ.
        max_mean_error: mean difference of the logits that is allowed, as a share of their standard deviation.
        progress: draws a bar.

    Returns:
        `images`, `as_written` and `optimized` (fields of `Difference`) and `layers` (fields of `IntegerCoverage`).

    Raises:
        VerificationError: ONNX's checker refuses the file, or a difference is larger than allowed.
        DataError: no image could be read.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerificationError(f"the file is not valid ONNX: {error}") from error
    networks: dict[str, Network] = {
        "as_written": ort_network(session(path, optimized=False)),
        "optimized": ort_network(session(path)),
    }
    reference, logits = run_beside(quant_model, networks, images, count, progress)
    step = _output_step(quant_model, path)
    differences = {name: difference(values, reference, step) for name, values in logits.items()}
    for name, found in differences.items():
        advice = _NO_VNNI if name == "optimized" and not has_vnni() else ""
        require_close(found, _TITLES[name], len(reference), min_agreement, max_mean_error, advice)
    coverage = integer_coverage(path)
    return {
        "images": len(reference),
        **{name: asdict(found) for name, found in differences.items()},
        "layers": {**asdict(coverage), "share": coverage.share},
    }


def _output_step(quant_model: QuantModel, path: Path) -> float | None:
    """The scale of the grid of the output, if the file's last node decodes one."""
    graph = onnx.load(str(path)).graph
    last = next((node for node in graph.node if graph.output[0].name in node.output), None)
    if last is None or last.op_type != "DequantizeLinear":
        return None
    scale = next((tensor for tensor in graph.initializer if tensor.name == last.input[1]), None)
    return None if scale is None else float(onnx.numpy_helper.to_array(scale))
