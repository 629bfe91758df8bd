"""Bias correction: the mean error that rounded weights make at a layer's output is taken out of its bias."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from synthquant.core.modules import hooked
from synthquant.core.quant_report import BiasCorrectionReport
from synthquant.data.image_set import ImageSet
from synthquant.models.samples import Samples
from synthquant.models.signature import Inputs, joined
from synthquant.nn.layers import QuantLayer
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet

# All samples go through the quantized network in one batch; this much for the largest output of a layer.
_LARGEST_OUTPUT = 2**29
_MOST_IMAGES = 256


@torch.no_grad()
def correct_biases(model: QuantModel, images: ImageSet | Samples) -> BiasCorrectionReport:
    """Add to each layer's bias `E[(W - W_hat) x]`, the mean over samples and positions for each output channel.

    Empirical bias correction (DFQ, arXiv:1906.04721, section 4.2 and appendix D). `x` is what the layer reads in the
    quantized network whose earlier layers are corrected already: the samples run through it once, as one batch. As many
    of them are used, up to 256, as keep the largest output of a layer under 0.5 GiB.

    DFQ's empirical variant compares with the float network's own outputs instead, which also takes out what earlier
    layers did. That is left out: large activations that earlier layers made smaller are no shift, and moving all values
    for them lets those through a ReLU that it held back. At two-bit weights it ruined ResNet-20.

    A layer without a bias gets one.

    Args:
        model: a quantized network with its float weights; its biases are changed in place.
        images: the calibration set.

    Raises:
        ModelError: it was loaded from a checkpoint, or its activation ranges are not set.
        DataError: no sample can be read.
    """
    model.require_calibrated()
    calibration = CalibrationSet(model, images)
    with model.mode(weights=False, activations=False):
        runs, largest = _look(model, next(calibration.batches(1)))
    count = max(1, min(_MOST_IMAGES, len(calibration), _LARGEST_OUTPUT // largest))
    batch = joined(list(calibration.batches(count)))
    rounded = [name for name, layer in model.layers.items() if layer.weight_quantizer is not None]
    corrected = [name for name in rounded if runs.get(name) == 1 and model.layers[name].has_own_bias]
    hooks = [(model.layers[name], _correct) for name in corrected]
    with model.mode(weights=True, activations=True), hooked(hooks, with_kwargs=True):
        batch.call(model)
    return BiasCorrectionReport(
        images=len(batch), layers=len(corrected), left_out=tuple(name for name in rounded if name not in corrected)
    )


def _look(model: QuantModel, sample: Inputs) -> tuple[dict[str, int], int]:
    """How often each layer runs for one sample, and the bytes of the largest output."""
    runs: dict[str, int] = {}
    sizes = [1]

    def hook(module: nn.Module, args: Any, output: Tensor, *, name: str) -> None:
        runs[name] = runs.get(name, 0) + 1
        sizes.append(output.numel() * output.element_size())

    with hooked([(layer, partial(hook, name=name)) for name, layer in model.layers.items()]):
        sample.call(model)
    return runs, max(sizes)


def _correct(layer: QuantLayer, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """Forward hook of a layer: move its bias by the mean error of its rounded weights, and run it again."""
    of_output, layer.output_quantizer = layer.output_quantizer, None
    try:
        mean = _channel_means(layer, layer.forward(*args, **kwargs))
        layer.weights_enabled = False
        wanted = _channel_means(layer, layer.forward(*args, **kwargs))
    finally:
        layer.weights_enabled, layer.output_quantizer = True, of_output
    layer.correct_bias((wanted - mean).to(output.dtype))
    result: Tensor = layer.forward(*args, **kwargs)
    return result


def _channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    """Mean over all but the channels, float64 `[C]`."""
    channel = channel_dimension(layer, output)
    return output.mean([dim for dim in range(output.ndim) if dim != channel], dtype=torch.float64)


def channel_dimension(layer: nn.Module, output: Tensor) -> int:
    """Where a layer's output has its channels: last behind a linear layer, second behind others."""
    return output.ndim - 1 if isinstance(layer, nn.Linear) else 1
