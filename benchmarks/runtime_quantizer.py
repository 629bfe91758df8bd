"""ONNX Runtime's own quantizer, the peer that exported networks are compared with, and how to run what it made.

`quantize_static` on the float export: QDQ form, weights int8 per channel, activations uint8, calibrated image by image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
from torch import Tensor

from synthquant.export.onnx.runtime import ort_network, session
from synthquant.export.onnx.speed import export_float
from synthquant.models.float_model import FloatModel

_IMAGES_AT_A_TIME = 8

Network = Callable[[Tensor], Tensor]
"""Images `[B, 3, H, W]` to logits `[B, classes]`, both on the CPU."""

Ranges = Literal["minmax", "entropy", "percentile"]


def quantize_with_runtime(model: FloatModel, inputs: Tensor, out: Path, ranges: Ranges = "percentile") -> Path:
    """Write to `out` what the runtime's own quantizer makes of a network.

    `inputs` are normalised images `[N, 3, H, W]`. `ranges` is how it takes the activations' ranges from them: smallest
    and largest value, least entropy, or the middle 99.999% of a histogram of 2,048 bins.
    """
    with TemporaryDirectory() as folder:
        return quantize_file_with_runtime(export_float(model, Path(folder) / "float.onnx"), inputs, out, ranges)


def quantize_file_with_runtime(
    reference: Path,
    inputs: Tensor,
    out: Path,
    ranges: Ranges,
    *,
    image_range: tuple[float, float] | None = None,
    reduce_range: bool = False,
) -> Path:
    """As `quantize_with_runtime`, for a network that is exported already.

    `image_range` are the ends of the grid of the image, which otherwise is what `inputs` span; `reduce_range` gives
    weights 7 bits, so that sums of two products fit 16 bits.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    methods = {
        "minmax": quantization.CalibrationMethod.MinMax,
        "entropy": quantization.CalibrationMethod.Entropy,
        "percentile": quantization.CalibrationMethod.Percentile,
    }

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[Tensor] = iter(inputs.unsqueeze(1))

        def __len__(self) -> int:
            return len(inputs)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._left = iter(inputs[start_index:end_index].unsqueeze(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self._left, None)
            return None if image is None else {"images": image.numpy()}

    # the name is historic: it goes for all methods, and bounds the images whose activations are held at a time
    extra: dict[str, Any] = {"CalibStridedMinMax": math.gcd(len(inputs), _IMAGES_AT_A_TIME)}
    if image_range is not None:
        ends = {"rmin": np.float32(image_range[0]), "rmax": np.float32(image_range[1])}
        extra["TensorQuantOverrides"] = {"images": [ends]}
    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(reference), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=methods[ranges],
            extra_options=extra,
        )
    return out


def exact_network(path: Path, threads: int | None = 1) -> Network:
    """Return a QDQ file as a function from images to logits, with exact sums on any CPU.

    Graph optimisations are off, so that operators run in float on values rounded to the grid, as the file says. With
    them, CPUs without VNNI add pairs of products of uint8 and int8 in 16 bits, which overflow: that is a fault of the
    kernel there and not of the ranges, and it would be held against the quantizer.
    """
    return ort_network(session(path, optimized=False, threads=threads))
