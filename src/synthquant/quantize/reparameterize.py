"""Scale reparameterisation of layer norms: grids for each channel become one grid for the tensor.

RepQ-ViT (arXiv:2212.08254), section 3.2. What a layer norm puts out has channels of very different ranges. A grid with
scale `s` and zero point `z` for each channel is found on images. Let `s'` and `z'` be their means, `r1 = s / s'` and
`r2 = z - z'`. The layer norm's weight and bias become `gamma / r1` and `(beta + s r2) / r1`, weights and biases of the
layers that read it `W r1` and `b - W (s r2)`: the network computes the same, and the one grid `(s', z')` rounds every
value as its channel's grid did.

Departures from the authors' code: `z'` is rounded, so that it is a code and the step is exact; channels that hardly
move have the smallest scale instead of blowing their layer norm up; ranges are those of the network without quantized
activations; the layer behind the last layer norm takes part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import get_module
from synthquant.core.quant_report import ReparameterizationReport
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.build import folded_copy
from synthquant.nn.equalization import Equalization
from synthquant.nn.layer_norms import LayersBehindNorm, layers_behind_norms
from synthquant.nn.observers import OBSERVERS, ActivationHistogram
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet, shown

_SMALLEST_SHARE = 1e-3
"""The scale of a channel that hardly moves, as a share of the mean."""


@dataclass(frozen=True)
class ChannelGrids:
    """A grid for each channel of what a layer norm puts out, and the one that takes their place.

    Attributes:
        scale: float64 `[C]`.
        zero_point: float64 `[C]`, whole numbers, of any size.
        mean_scale: float64, no dimensions; a float32 number.
        mean_zero_point: float64, no dimensions: a code.
    """

    scale: Tensor
    zero_point: Tensor
    mean_scale: Tensor
    mean_zero_point: Tensor

    @classmethod
    def of(cls, scale: Tensor, zero_point: Tensor, quant_max: int) -> ChannelGrids:
        """From what an observer found for each channel, `[C]` each."""
        low, scale = -zero_point.double() * scale.double(), scale.double()
        floored = scale.clamp(min=float(scale.mean()) * _SMALLEST_SHARE)
        zero_point = torch.where(floored > scale, torch.round(-low / floored), zero_point.double())
        mean_zero_point = torch.round(zero_point.mean()).clamp(0, quant_max)
        return cls(floored, zero_point, floored.mean().float().double(), mean_zero_point)

    @property
    def factor(self) -> Tensor:
        """`r1`, float64 `[C]`."""
        return self.scale / self.mean_scale

    @property
    def shift(self) -> Tensor:
        """`s r2`, float64 `[C]`."""
        return self.scale * (self.zero_point - self.mean_zero_point)


@dataclass(frozen=True)
class Reparameterization:
    """How the layer norms of a network are changed.

    Attributes:
        equalization: what is done to layer norms and layers.
        grids: by the name of its quantizer, what each channel of a tensor has now and is to have.
        report: which layer norms take part.
    """

    equalization: Equalization
    grids: Mapping[str, ChannelGrids]
    report: ReparameterizationReport


def reparameterization(
    quant_model: QuantModel, calibration: CalibrationSet, count: int, observer: str
) -> Reparameterization:
    """Find the grids of channels behind layer norms and what puts one grid in their place; change nothing.

    A layer norm takes part if nothing but quantized linear layers reads it, all through grids of the same bits; the
    report names the others.

    Args:
        quant_model: with its float weights; ranges need not be set.
        calibration: samples for it.
        count: how many of them to look at.
        observer: how ranges of channels are searched where the scheme does not say.

    Raises:
        UnsupportedModelError: no layer norm can take part; says why.
        ModelError: the network was loaded from a checkpoint.
    """
    module = _float_network(quant_model)
    groups, left = _groups(quant_model, module)
    quantizers = {group.norm: _quantizers(quant_model, group) for group in groups}
    watchers = {norm: ActivationHistogram(channel=-1) for norm in quantizers}
    watching = [(quantizer, watchers[norm]) for norm, own in quantizers.items() for quantizer in own.values()]
    found, grids = Equalization(), {}
    with (
        quant_model.mode(weights=False, activations=False),
        torch.no_grad(),
        shown(watching, lambda: calibration.run(quant_model, count)),
    ):
        for group in groups:
            own = _channel_grids(next(iter(quantizers[group.norm].values())), watchers[group.norm], observer)
            grids.update(dict.fromkeys(quantizers[group.norm], own))
            found = found.then(_change(module, group, own))
    return Reparameterization(found, grids, ReparameterizationReport(norms=tuple(quantizers), left_out=left))


def require_layer_norms(quant_model: QuantModel) -> None:
    """Raise `UnsupportedModelError` if no layer norm of a network that was just built can take part; says why."""
    _groups(quant_model, _float_network(quant_model))


def _float_network(quant_model: QuantModel) -> nn.Module:
    module, _ = folded_copy(quant_model.float_model, fold=quant_model.fold)
    if quant_model.equalization is not None:
        quant_model.equalization.apply(module)
    return module


def _groups(quant_model: QuantModel, module: nn.Module) -> tuple[list[LayersBehindNorm], dict[str, str]]:
    """Layer norms that take part, and why others do not."""
    groups, left = layers_behind_norms(module, quant_model.float_model.example(2))
    reasons = {group.norm: _unfit(quant_model, group) for group in groups}
    left |= {norm: reason for norm, reason in reasons.items() if reason}
    fit = [group for group in groups if not reasons[group.norm]]
    if not fit:
        raise UnsupportedModelError(f"{quant_model.float_model.name}: {_nothing(left)}")
    return fit, left


def _quantizers(quant_model: QuantModel, group: LayersBehindNorm) -> dict[str, ActivationQuantizer]:
    names = dict.fromkeys(quant_model.reads[layer] for layer in group.layers)
    return {name: quant_model.quantizers[name] for name in names}


def _unfit(quant_model: QuantModel, group: LayersBehindNorm) -> str:
    """Why what the layers read cannot have a grid for each channel; empty if it can."""
    for layer in group.layers:
        if layer not in quant_model.reads:
            return f"{layer} reads it in floating point"
    names = {quant_model.reads[layer] for layer in group.layers}
    if any(name in names and layer not in group.layers for layer, name in quant_model.reads.items()):
        return "a layer that reads another tensor shares its quantizer"
    own = {quant_model.quantizers[name].args for name in names}
    if len(own) > 1:
        return f"{', '.join(group.layers)} read it on different grids"
    if not all(quant_model.quantizers[name].affine for name in names):
        return f"its quantizer is of kind {next(iter(own)).kind}"
    return ""


def _nothing(left: Mapping[str, str]) -> str:
    wanted = "no layer norm whose output goes to quantized linear layers alone, which reparameterisation is for"
    if not left:
        return f"there is {wanted}; there is no layer norm at all"
    named = [f"{norm}: {reason}" for norm, reason in list(left.items())[:2]]
    more = f", and {len(left) - 2} more" if len(left) > 2 else ""
    return f"there is {wanted} ({'; '.join(named)}{more})"


def _channel_grids(quantizer: ActivationQuantizer, watcher: ActivationHistogram, observer: str) -> ChannelGrids:
    args = quantizer.args
    search, symmetric = OBSERVERS.get(args.observer or observer), args.symmetric
    samples = watcher.samples()
    scale, zero_point = search(samples, args.num_bits, symmetric=symmetric, zero_inside=symmetric, signed=symmetric)
    return ChannelGrids.of(scale.cpu(), zero_point.cpu(), args.quant_max)


def _change(module: nn.Module, group: LayersBehindNorm, grids: ChannelGrids) -> Equalization:
    """What is done to a layer norm and the layers that read it."""
    factor, shift = grids.factor, grids.shift
    weights = {name: get_module(module, name).get_parameter("weight").detach().cpu().double() for name in group.layers}
    return Equalization(
        columns=dict.fromkeys(group.layers, factor),
        shifts={name: -(weight @ shift) for name, weight in weights.items()},
        norms=dict.fromkeys((group.weight, group.bias), 1 / factor),
        norm_shifts={group.bias: shift / factor},
    )
