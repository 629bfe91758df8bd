"""Second moments of what layers read: all that a linear regression of their weights needs to know of the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import DataError
from synthquant.core.modules import hooked
from synthquant.nn.layers import QuantLayer, first_replaced
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.weight_quantizers import WeightLayout, WeightQuantizer
from synthquant.quantize.calibrate import CalibrationSet

# Bytes of the largest tensor of columns that is made at a time.
_COLUMNS = 2**26
# Bytes of the sums that are kept at a time, unless those of one layer are larger.
_SUMS = 2**30
# Largest share of a layer's output by which it may differ from its weight times its columns, in float32.
_SAME = 1e-3


class InputMoments:
    """Sums over all rows that a layer reads: tokens, or the positions at which a kernel stands.

    A row `a` holds the values of which one output is a weighted sum, as the quantized layer reads them, and behind them
    a 1 if the layer has a bias: a layer without one is given none. `x` is the row before it was quantized, and `W` the
    float weight with the bias as its last column.

    Attributes:
        weight: `W`, float64 `[G, C / G, K]`, `G` the groups of a convolution and `C` its output channels.
        has_bias: the last of the `K` columns is the bias.
        gram: sum of `a a^T`, float64 `[G, K, K]`.
        cross: sum of `W (x - a) a^T`, float64 `[G, C / G, K]`: what quantizing the input takes from the output.
        error: sum of `|W (x - a)|^2`.
        rows: how many rows there were.
        finite: all that the layer read was; otherwise the sums are of no use.
        linear: the layer puts out its weight times these rows plus its bias; if not, nothing is summed up.
    """

    def __init__(self, layer: QuantLayer, quantize: Callable[[Tensor], Tensor] | None) -> None:
        """Start empty.

        Args:
            layer: a convolution or linear layer, in floating point.
            quantize: what its input goes through in the quantized network; none: nothing.
        """
        self._layer, self._quantize = layer, quantize
        layout, weight, bias = _layout(layer), layer.float_weight, layer._parameters.get("bias")
        groups = int(getattr(layer, "groups", 1))
        rows = layout.rows(weight).double().reshape(groups, layout.channels // groups, -1)
        self.has_bias = bias is not None
        if bias is not None:
            rows = torch.cat([rows, bias.detach().double().reshape(*rows.shape[:2], 1)], 2)
        self.weight = rows
        self.gram = rows.new_zeros(groups, rows.shape[2], rows.shape[2])
        self.cross = torch.zeros_like(rows)
        self.error, self.rows, self.finite = 0.0, 0, True
        # A bias that is computed from other parameters can be neither corrected nor left out.
        self.linear = layer.has_own_bias

    def observe(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook: add what the layer is about to read."""
        x = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))

        def run(part: Tensor) -> Tensor:
            replaced, named = first_replaced(lambda _: part, args, kwargs)
            output: Tensor = self._layer.forward(*replaced, **named)
            return output

        self.finite = self.finite and bool(torch.isfinite(x).all())
        if self.rows == 0 and self.linear and self.finite:
            self.linear = self._computes_weight_times_columns(x[:1], run)
        if self.linear and self.finite:
            bytes_each = x[:1].numel() * _kernel_size(self._layer) * self.gram.element_size()
            for part in torch.split(x, max(1, _COLUMNS // bytes_each)):
                self._add(part, run)

    def output_error(self, weight: Tensor) -> float:
        """Squared error of the output with another weight, `[G, C / G, K]`, summed over channels: the mean of rows."""
        left = self.weight - weight
        whole = self.error + float((left * (2 * self.cross + left @ self.gram)).sum())
        return max(whole, 0.0) / max(self.rows, 1)

    def _add(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> None:
        read = x if self._quantize is None else self._quantize(x)
        columns = self._columns(read, run)
        self.gram += columns @ columns.mT
        self.rows += columns.shape[2]
        if self._quantize is not None:
            lost = self._by_group(run(x - read))
            if self.has_bias:
                lost -= self.weight[:, :, -1:]
            self.cross += lost @ columns.mT
            self.error += float(lost.square().sum())

    def _columns(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """All rows, as columns, float64 `[G, K, R]`."""
        if isinstance(self._layer, nn.Linear):
            columns = self._by_group(x)
        else:
            with _picking(self._layer):
                columns = self._by_group(run(x))
        return torch.cat([columns, torch.ones_like(columns[:, :1])], 1) if self.has_bias else columns

    def _by_group(self, x: Tensor) -> Tensor:
        """The channels of a tensor by group, and all its positions, float64 `[G, N, R]`."""
        channels = x.movedim(-1 if isinstance(self._layer, nn.Linear) else 1, 0).double()
        return channels.reshape(len(self.gram), channels.shape[0] // len(self.gram), -1)

    def _computes_weight_times_columns(self, x: Tensor, run: Callable[[Tensor], Tensor]) -> bool:
        """A layer's own forward may do more: standardise its weight, scale, activate."""
        wanted, found = self._by_group(run(x)), self.weight @ self._columns(x, run)
        return wanted.shape == found.shape and bool((wanted - found).abs().max() <= _SAME * wanted.abs().max())


@torch.no_grad()
def gather(model: QuantModel, samples: CalibrationSet, count: int, names: Sequence[str]) -> dict[str, InputMoments]:
    """Moments of what layers of the float network read, from one pass over `count` samples.

    Memory does not grow with samples. Of the layers named, at least one and as many are taken, in that order, as keep
    their sums within 1 GiB.

    Raises:
        DataError: a layer reads values that are not finite; no sample can be read.
    """
    found: dict[str, InputMoments] = {}
    size = 0
    for name in names:
        weight = model.layers[name].float_weight
        columns = weight.numel() // _layout(model.layers[name]).channels + 1
        size += (int(getattr(model.layers[name], "groups", 1)) * columns**2 + 2 * weight.numel()) * 8
        if found and size > _SUMS:
            break
        quantizer = model.quantizers[model.reads[name]] if name in model.reads else None
        found[name] = InputMoments(model.layers[name], None if quantizer is None else quantizer.quantize)
    hooks = [(model.layers[name], moments.observe) for name, moments in found.items()]
    with model.mode(weights=False, activations=False), hooked(pre=hooks, with_kwargs=True):
        for batch in samples.batches(count):
            batch.call(model)
    for name, moments in found.items():
        if not moments.finite:
            raise DataError(f"{name} reads values that are not finite for some calibration image")
    return found


def _layout(layer: QuantLayer) -> WeightLayout:
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, WeightQuantizer), "only layers with quantized weights are regressed"
    return quantizer.layout


def _kernel_size(layer: QuantLayer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.float_weight[0, 0].numel()


@contextmanager
def _picking(layer: Any) -> Iterator[None]:
    """Let a convolution put out the values that it sums up, `[B, channels * kernel, ...]`, for a while.

    Each input channel becomes a group, with one kernel for each place, which is 1 there and 0 elsewhere. So the layer's
    own forward unfolds its input, whatever its padding.
    """
    weight, groups, bias, float_bias = layer.float_weight, layer.groups, layer._parameters["bias"], layer.float_bias
    size, kernel = _kernel_size(layer), weight.shape[2:]
    places = torch.eye(size, dtype=weight.dtype, device=weight.device).reshape(size, *kernel)
    transposed = bool(_layout(layer).transposed_groups)
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    picks = places.expand(channels, *places.shape)
    try:
        layer.groups, layer._parameters["bias"], layer.float_bias = channels, None, None
        layer._parameters["weight"] = picks if transposed else picks.reshape(channels * size, 1, *kernel)
        yield
    finally:
        layer.groups, layer._parameters["bias"], layer.float_bias = groups, bias, float_bias
        layer._parameters["weight"] = weight
