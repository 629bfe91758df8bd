"""Output correction: what is systematic in a quantized network's error is taken out of the layer that ends it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import hooked
from synthquant.core.quant_report import OutputCorrectionReport
from synthquant.data.image_set import ImageSet
from synthquant.models.samples import Samples
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.bias_correction import channel_dimension
from synthquant.quantize.calibrate import CalibrationSet

# A factor further from 1 is no loss of scale but an output that has little to do with the float one.
_LEAST_GAIN, _LARGEST_GAIN = 0.5, 2.0


@torch.no_grad()
def correct_output(model: QuantModel, images: ImageSet | Samples) -> OutputCorrectionReport:
    """Let each channel of the last layer's output be the float network's, but for an error that has nothing to do
    with it.

    The quantized output of a channel is `(1 + k) y + b + e`, where `y` is the float output, `e` has mean 0 and no
    correlation with `y`, and `k` and `b` are from a linear regression over samples and positions. Division by `1 + k`
    goes into the scales of the layer's weights, what remains of `b` into its bias, so it costs nothing at run time.
    Samples that name steps of a sampler are regressed step by step, and the median of the steps is taken: it is the
    noisy steps, most of a sampler's, that must be right, because there a picture is a hundredth of what the denoiser
    puts out, and an error of its mean decides how bright the image becomes.

    After PTQD (arXiv:2305.10657, equations 8 to 11), which corrects in the sampler, with factors for each step; there
    the rest, `e`, is also counted as noise of the sampler.

    A layer in floating point, with scales of the whole tensor, or with codes that other layers share, has its bias
    corrected only. So have channels whose `1 + k` is below 1/2 or above 2.

    Args:
        model: a quantized network with its float weights; its last layer is changed in place.
        images: the calibration set; all of it is used.

    Raises:
        ModelError: it was loaded from a checkpoint, or its activation ranges are not set.
        UnsupportedModelError: the last layer has no bias of its own, or does not run exactly once.
        DataError: no sample can be read.
    """
    model.require_calibrated()
    name = model.last_layer
    if name not in model.layers or not model.layers[name].has_own_bias:
        raise UnsupportedModelError(
            f"{model.float_model.name}: {name}, which makes the output, has no bias of its own that could be corrected"
        )
    layer, calibration = model.layers[name], CalibrationSet(model, images)
    sums = _regression_sums(model, calibration)
    steps = calibration.steps_of(len(sums))
    groups = [slice(None)] if steps is None else [steps == step for step in torch.unique(steps)]
    of_steps = [sums[group].sum(0) for group in groups]
    gain = torch.stack([_slope(step) for step in of_steps]).median(0).values
    quantizer = layer.weight_quantizer
    shared = [other for other in model.layers.values() if other.weight_quantizer is quantizer]
    if quantizer is None or len(shared) > 1 or len(quantizer.scale) != len(gain):
        gain = torch.ones_like(gain)
    gain = torch.where((gain >= _LEAST_GAIN) & (gain <= _LARGEST_GAIN), gain, 1.0)
    shift = torch.stack([(made - gain * wanted) / count for count, wanted, made, *_ in of_steps]).median(0).values
    own = layer._parameters["bias"]
    bias = torch.zeros_like(shift) if own is None else own.detach().double()
    weight = layer.float_weight
    layer.set_bias(((bias - shift) / gain).to(weight.dtype))
    if quantizer is not None and bool((gain != 1).any()):
        quantizer.scale.div_(gain.to(quantizer.scale.dtype)[:, None, None])
    return OutputCorrectionReport(
        layer=name,
        samples=len(sums),
        shift=float(shift.square().mean().sqrt()),
        gain_low=float(gain.min()),
        gain_high=float(gain.max()),
    )


def _regression_sums(model: QuantModel, calibration: CalibrationSet) -> Tensor:
    """For each sample and channel of the last layer's output the number of values and the sums of `y`, `q`, `y y` and
    `y q`, where `y` is the float network's and `q` the quantized one's: float64 `[N, 5, C]`.
    """
    layer, found, put_out = model.layers[model.last_layer], [], []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        values = output.movedim(channel_dimension(layer, output), 1)
        put_out.append(values.reshape(*values.shape[:2], -1).double())

    for batch in calibration.batches():
        put_out.clear()
        with hooked([(layer, keep)]):
            with model.mode(weights=False, activations=False):
                batch.call(model)
            batch.call(model)
        if len(put_out) != 2 or len(put_out[0]) != len(batch):
            raise UnsupportedModelError(
                f"{model.float_model.name}: {model.last_layer}, which makes the output, does not run exactly once for"
                " all samples, so there is no output to correct"
            )
        wanted, made = put_out
        count = torch.full_like(wanted[:, :, 0], wanted.shape[2])
        found.append(torch.stack([count, *(s.sum(2) for s in (wanted, made, wanted**2, wanted * made))], 1))
    return torch.cat(found)


def _slope(sums: Tensor) -> Tensor:
    """Slope of the quantized output over the float one, `[C]`, from sums `[5, C]`; 1 over a constant."""
    wanted, made, squares, products = (total / sums[0] for total in sums[1:])
    variance = squares - wanted**2
    varies = variance > torch.finfo(torch.float32).eps * squares
    return torch.where(varies, (products - wanted * made) / torch.where(varies, variance, 1.0), 1.0)
