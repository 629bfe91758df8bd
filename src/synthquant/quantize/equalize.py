"""Equalisation: finding the factors by which channels are scaled before quantization.

`weights`: Data-Free Quantization Through Weight Equalization and Bias Correction (arXiv:1906.04721), sections 4.1.1 to
4.1.3: with `r1` the range of a channel's rows in the layers that make it and `r2` that of its columns in the layers
that read it, `s = sqrt(r1 r2) / r2` makes both equal; repeated over the network until nothing changes. Then what a ReLU
hardly ever cuts, `c = max(0, beta - 3 gamma)` of the batch norm before it, moves from its bias into the next bias.

`activations`: SmoothQuant's migration (arXiv:2211.10438), equation 4 with its strength of a half, on convolutions: with
`a` the range of a channel on calibration images, `s = sqrt(a / w)`. There `w` is the range of the columns, here the
share that they take of their grid: of the range of their row, or of the whole weight if that has one scale. (Columns of
a depthwise layer share a scale with no other channel's, and `s = a` would cost them nothing. It was worse on images
other than those that ranges came from: then every channel ends where those images did.)

`layer_norms`: RepQ-ViT's reparameterisation, in `quantize.reparameterize`.

The first two leave a network that computes the same (the ReLU but for three deviations). They depart from their papers
where those stop at a residual connection: all layers that write into a stream or read it share its scales. A ReLU6
stays one, for `weights` with a bound for each channel, where the paper takes a ReLU; for `activations` it pins them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synthquant.core.errors import DataError, UnsupportedModelError
from synthquant.core.modules import get_module, hooked
from synthquant.core.progress import QUIET, Progress
from synthquant.data.image_set import ImageSet
from synthquant.methods import Equalize
from synthquant.models.channels import Channels
from synthquant.models.float_model import FloatModel
from synthquant.models.samples import Samples
from synthquant.models.signature import named_outputs
from synthquant.models.trace import trace
from synthquant.nn.build import folded_copy
from synthquant.nn.equalization import Equalization, weight_by_group
from synthquant.nn.layers import QuantLayer
from synthquant.nn.quant_model import QuantModel
from synthquant.quantize.calibrate import CalibrationSet
from synthquant.quantize.reparameterize import reparameterization

_IMAGES = 64
"""Images from which the ranges of channels are taken."""
_SWEEPS = 100
_SMALLEST_CHANGE = 1e-3
"""Sweeps over the weights end when no factor changes by more than this share."""
_DEVIATIONS = 3
_MOST_STRETCHED = 8
"""How much wider than a channel the widest of its tensor may be taken to be: other images may move it more."""
_TOLERANCE = 1e-3
"""Largest difference of an output, as a share of its largest value, that rounding may make."""


def equalized(
    quant_model: QuantModel, kind: Equalize, images: ImageSet | Samples | None, progress: Progress = QUIET
) -> QuantModel:
    """Return a quantized network built anew from the equalised float network; warn if nothing could be equalised.

    Args:
        quant_model: just built; left as it was.
        kind: `none` gives back `quant_model`.
        images: those to quantize with; `weights` looks at none.
        progress: told if no channel can be scaled.

    Raises:
        UnsupportedModelError: the equalised network computes something else.
            Or no layer norm stands before linear layers alone.
        DataError: there are no images to take ranges from.
    """
    if kind == "none":
        return quant_model
    if kind == "layer_norms":
        return _reparameterized(quant_model, images, progress)
    float_model = quant_model.float_model
    module, folded = folded_copy(float_model)
    example = float_model.example(2)
    # Runtimes fuse a clip with one bound into the integer kernel before it, and one with many not. And a clip has made
    # ranges of activations even: those of channels that are seldom active are not to be had from a few images.
    through_clips = kind == "weights" and quant_model.scheme.deploy != "full"
    channels = Channels(module, trace(module, example), through_clips=through_clips)
    if bool(channels.pinned.all()):
        progress.warn(f"{float_model.name}: no channels can be scaled; quantize.equalize changes nothing")
        return quant_model
    with torch.no_grad():
        before = named_outputs(example.clone().call(module))
        if kind == "weights":
            scales = weight_scales(module, channels)
        elif images is None:
            raise DataError("ranges of activations come from images, and there are none")
        else:
            scales = activation_scales(quant_model, channels, channel_ranges(quant_model, channels, images))
        found = _as_factors(channels, scales)
        found.apply(module)
        _require_same(float_model, before, named_outputs(example.clone().call(module)))
    if kind == "weights":
        found = _absorbed(float_model.module, folded, module, channels, found)
    return QuantModel.build(float_model, quant_model.scheme, found, fold=quant_model.fold)


def _reparameterized(quant_model: QuantModel, images: ImageSet | Samples | None, progress: Progress) -> QuantModel:
    if images is None:
        raise DataError("grids of channels come from images, and there are none")
    calibration = CalibrationSet(quant_model, images)
    found = reparameterization(quant_model, calibration, _IMAGES, "percentile")
    progress.say(str(found.report))
    return QuantModel.build(quant_model.float_model, quant_model.scheme, found.equalization, fold=quant_model.fold)


def weight_scales(module: nn.Module, channels: Channels) -> Tensor:
    """The paper's factors, float64 `[count]`: rows are to be divided and columns multiplied by them.

    One layer's output channels after the other are set by the ranges that the others have left, until nothing changes.
    """
    ranges = _Ranges(module, channels)
    for _ in range(_SWEEPS):
        before = ranges.scales.clone()
        for name in channels.made:
            own = torch.unique(channels.made[name])
            own = own[~channels.pinned[own]]
            rows, columns = ranges.of_rows(own), ranges.of_columns(own)
            ranges.scales[own] *= torch.where((rows > 0) & (columns > 0), (rows / columns).sqrt(), 1.0)
        if bool(((ranges.scales / before).log().abs() < _SMALLEST_CHANGE).all()):
            break
    return ranges.scales


def activation_scales(quant_model: QuantModel, channels: Channels, activations: Tensor) -> Tensor:
    """SmoothQuant's factors, float64 `[count]`, from the ranges `[count]` of channels on images.

    Args:
        quant_model: not equalised; says which weights share a scale.
        channels: of its network.
        activations: the largest absolute values, as `channel_ranges` finds them.
    """
    ranges, shares = activations.clone(), torch.zeros(channels.count, dtype=torch.float64)
    for name, own in channels.read.items():
        floor = (activations[own].max() / _MOST_STRETCHED).expand(len(own))
        ranges.scatter_reduce_(0, own, floor, "amax")
        shares.scatter_reduce_(0, own, _column_shares(quant_model.layers.get(name), len(own)), "amax")
    alive = (activations > 0) & (shares > 0) & ~channels.pinned
    return torch.where(alive, (ranges / shares).sqrt(), 1.0)


def _column_shares(layer: QuantLayer | None, count: int) -> Tensor:
    """`[count]`: what the columns of each input channel take of the weight's grids, at most 1; 0 for dead channels.

    A weight that stays in float has no grid: its columns all count as 1.
    """
    if layer is None or layer.weight_quantizer is None:
        return torch.ones(count, dtype=torch.float64)
    largest = _largest(layer)
    whole = layer.weight_quantizer.args.strategy == "tensor"
    grids = largest.max().expand_as(largest) if whole else largest.amax(2, keepdim=True).expand_as(largest)
    return torch.where(grids > 0, largest / grids, 0.0).amax(1).flatten()


def channel_ranges(quant_model: QuantModel, channels: Channels, images: ImageSet | Samples) -> Tensor:
    """`[count]`: the largest absolute value that layers read of each channel on the first images, in float."""
    ranges = torch.zeros(channels.count, dtype=torch.float64)

    def watch(numbers: Tensor) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            largest = args[0].abs().transpose(0, 1).flatten(1).amax(1)
            ranges.scatter_reduce_(0, numbers, largest.double().cpu(), "amax")

        return hook

    watched = [(get_module(quant_model.module, name), watch(numbers)) for name, numbers in channels.read.items()]
    with quant_model.mode(weights=False, activations=False), hooked(pre=watched):
        for batch in CalibrationSet(quant_model, images).batches(_IMAGES, size=16):
            batch.call(quant_model)
    return ranges


class _Ranges:
    """The ranges of the weights of all layers under scales of their channels.

    Attributes:
        scales: float64 `[count]`; rows are divided and columns multiplied by them.
    """

    def __init__(self, module: nn.Module, channels: Channels) -> None:
        self._channels = channels
        self.scales = torch.ones(channels.count, dtype=torch.float64)
        self._largest = {}
        for name in channels.made:
            self._largest[name] = _largest(get_module(module, name))

    def of_rows(self, numbers: Tensor) -> Tensor:
        """The largest weight of the rows that make each of these channels."""
        return self._over(self._channels.made, numbers, 2)

    def of_columns(self, numbers: Tensor) -> Tensor:
        """The largest weight of the columns that read each of these channels."""
        return self._over(self._channels.read, numbers, 1)

    def _over(self, members: Mapping[str, Tensor], numbers: Tensor, axis: int) -> Tensor:
        wanted = torch.zeros(self._channels.count, dtype=torch.bool)
        wanted[numbers] = True
        found = torch.zeros(self._channels.count, dtype=torch.float64)
        for name, own in members.items():
            if bool(wanted[own].any()):
                largest = self._largest[name]
                groups, outputs, inputs = largest.shape
                rows = self.scales[self._channels.made[name]].view(groups, outputs, 1)
                columns = self.scales[self._channels.read[name]].view(groups, 1, inputs)
                found.scatter_reduce_(0, own, (largest / rows * columns).amax(axis).flatten(), "amax")
        return found[numbers]


def _largest(layer: nn.Module) -> Tensor:
    """`[G, C_out / G, C_in / G]`, float64: the largest absolute weight between two channels."""
    weight = weight_by_group(layer).detach().cpu().double().abs()
    return weight.flatten(3).amax(3) if weight.ndim > 3 else weight


def _as_factors(channels: Channels, scales: Tensor) -> Equalization:
    """What the scales mean for each layer and clip; those that stay as they are are left out."""

    def changed(members: Mapping[str, Tensor], values: Tensor) -> dict[str, Tensor]:
        return {name: values[own].float() for name, own in members.items() if bool((values[own] != 1).any())}

    inverse = 1 / scales
    return Equalization(
        changed(channels.made, inverse), changed(channels.read, scales), {}, changed(channels.clips, inverse)
    )


def _absorbed(
    network: nn.Module, folded: list[tuple[str, str]], module: nn.Module, channels: Channels, found: Equalization
) -> Equalization:
    """The same with what ReLUs hardly ever cut moved from a bias into the next ones.

    Args:
        network: the float network, with its batch norms.
        folded: pairs (batch norm, layer).
        module: the folded network, already scaled.
        channels: its channels.
        found: how it was scaled.
    """
    shifts: dict[str, Tensor] = {}
    bound_shifts: dict[str, Tensor] = {}
    norms = {layer: get_module(network, norm) for norm, layer in folded}
    for name, (clip, readers) in channels.shifts.items():
        norm = norms.get(name)
        if not isinstance(norm, _BatchNorm) or any(get_module(module, reader).bias is None for reader in readers):
            continue
        if clip and cast(nn.Hardtanh, get_module(network, clip)).min_val != 0:
            continue
        gamma, beta = _affine(norm)
        rows = found.rows.get(name, torch.ones_like(beta))
        moved = ((beta - _DEVIATIONS * gamma.abs()).clamp(min=0) * rows).float()
        if not bool(moved.any()):
            continue
        shifts[name] = shifts.get(name, torch.zeros_like(moved)) - moved
        if clip:
            bound_shifts[clip] = -moved
        for reader in readers:
            weight = weight_by_group(get_module(module, reader)).detach().cpu()
            groups, outputs, inputs = weight.shape[:3]
            into = (weight.reshape(groups, outputs, inputs) @ moved.view(groups, inputs, 1)).flatten()
            shifts[reader] = shifts.get(reader, torch.zeros_like(into)) + into
    return replace(found, shifts=shifts, bound_shifts=bound_shifts)


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Deviation and mean `[C]` of what a batch norm puts out."""
    ones = torch.ones(norm.num_features)
    gamma = ones if norm.weight is None else norm.weight.detach().cpu()
    return gamma, 0 * ones if norm.bias is None else norm.bias.detach().cpu()


def _require_same(float_model: FloatModel, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for name, wanted in before.items():
        error, largest = float((after[name] - wanted).abs().max()), float(wanted.abs().max())
        if not error <= _TOLERANCE * largest:
            what = "logits" if float_model.task == "classify" else f"output {name}".rstrip()
            raise UnsupportedModelError(
                f"{float_model.name}: equalised it computes something else ({what} of {largest:.3g} differ by"
                f" {error:.2g}); leave quantize.equalize out"
            )
