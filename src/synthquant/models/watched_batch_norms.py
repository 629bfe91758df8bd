"""A network whose batch norms say what enters them, and how far that is from what they remember of their training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import replace_module
from synthquant.models.batch_norm import batch_norm_layers, batch_norm_targets
from synthquant.models.batch_norm_loss import TARGET_EPSILON, measure, normalize_and_measure, statistics_loss

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class WatchedBatchNorms:
    """The batch norms of a network in evaluation mode, which measure their inputs with gradients.

    Attributes:
        names: module names of those that keep running statistics.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        per_image: bool,
        channel_weights: Literal["mean", "sum"] = "sum",
        epsilon: float = 0.0,
    ) -> None:
        """Change `network`, a private copy, in place.

        Args:
            network: computes the same afterwards, with batch norms frozen.
            name: what errors call it.
            per_image: measure each image, rather than the batch.
            channel_weights: whether a layer counts as much as it has channels (`sum`), or all layers alike (`mean`).
            epsilon: added to variances before their square root is taken.
        """
        self._name = name
        self._channel_weights = channel_weights
        self._options: dict[str, Any] = {"per_image": per_image, "epsilon": epsilon}
        self._measured: list[tuple[str, Tensor, int]] = []
        self._targets_of: dict[str, Tensor] = {}
        self._order: tuple[str, ...] | None = None
        self._targets = self._weights = self._layer_of = torch.empty(0)
        layers = batch_norm_layers(network)
        for norm, target in batch_norm_targets(network).items():
            deviation = (target.variance.float() + TARGET_EPSILON).sqrt()
            self._targets_of[norm] = torch.stack([target.mean.float(), deviation])
            if type(layers[norm]) in _PLAIN:
                replace_module(network, norm, _MeasuredBatchNorm(layers[norm], self._recorder(norm), self._options))
            else:
                # A subclass may do more than normalise, so it runs as it is, behind the measurement.
                layers[norm].register_forward_pre_hook(self._measuring_hook(norm))
        self.names = tuple(self._targets_of)

    def statistics(self, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
        """Run the network; return what enters its batch norms and over how many values each statistic is taken.

        Means and deviations are `[2, C]`, or `[2, B, C]` per image, of all layers in the order in which they ran; the
        counts are `[C]`. Raises `UnsupportedModelError` if no batch norm runs as a module.
        """
        self._measured.clear()
        run()
        order = tuple(name for name, _, _ in self._measured)
        if order != self._order:
            self._set_targets(order)
        statistics = torch.cat([values for _, values, _ in self._measured], dim=-1)
        counts = [self._weights.new_full((values.shape[-1],), count) for _, values, count in self._measured]
        self._measured.clear()
        return statistics, torch.cat(counts)

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """Name and channels of each layer in the order in which they ran last; one that ran twice stands there twice.

        Their channels side by side are the C of `statistics`.
        """
        return tuple((name, self._targets_of[name].shape[1]) for name in self._order or ())

    def gaps(self, statistics: Tensor) -> Tensor:
        """Distance of each statistic to that of the training data, of the shape of `statistics`."""
        return (statistics - (self._targets if statistics.ndim == 2 else self._targets[:, None])).abs()

    def distance(self, statistics: Tensor, *, slack: Tensor | None = None, enhanced: Tensor | None = None) -> Tensor:
        """Squared distance of statistics to those of the training data, weighted and summed; a scalar.

        Args:
            statistics: as `statistics` gave them.
            slack: `[2, C]`, what gaps may be wide before they count.
            enhanced: int64 `[B]`, for statistics per image: the layer that counts twice for each image.
        """
        weights = self._weights
        if enhanced is not None:
            weights = weights * (1 + (self._layer_of == enhanced[:, None]))
        return statistics_loss(statistics, self._targets, weights, slack)

    def _recorder(self, name: str) -> Callable[[Tensor, Tensor], None]:
        def record(inputs: Tensor, statistics: Tensor) -> None:
            self._measured.append((name, statistics, inputs.numel() // max(inputs.shape[1], 1)))

        return record

    def _measuring_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        record = self._recorder(name)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            del module
            record(inputs[0], measure(inputs[0], **self._options))

        return hook

    def _set_targets(self, order: tuple[str, ...]) -> None:
        """Put the targets in the order in which the layers ran; a layer that ran twice counts twice."""
        if not order:
            raise UnsupportedModelError(
                f"{self._name}: no batch norm runs as a module (its forward may read their statistics itself), so what"
                " enters them cannot be seen; call the modules, or use a method that needs none, such as noise"
            )
        targets = [self._targets_of[name] for name in order]
        each = [1.0 / part.shape[1] if self._channel_weights == "mean" else 1.0 for part in targets]
        weights = [part.new_full((part.shape[1],), weight) for part, weight in zip(targets, each, strict=True)]
        layer_of = [part.new_full((part.shape[1],), index) for index, part in enumerate(targets)]
        self._order, self._layer_of = order, torch.cat(layer_of)
        self._targets, self._weights = torch.cat(targets, dim=1), torch.cat(weights)


class _MeasuredBatchNorm(nn.Module):
    """A frozen batch norm that reports the statistics of its input, in one fused pass each way."""

    def __init__(self, layer: nn.Module, record: Callable[[Tensor, Tensor], None], options: dict[str, Any]) -> None:
        super().__init__()
        scale, shift = _affine(layer)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self._record = record
        self._layer = (layer,)  # in a tuple, so that it is no part of this module
        self._options = options

    def __getattr__(self, name: str) -> Any:
        # A forward may read the numbers of a batch norm beside calling it, or instead.
        if name in self.__dict__.get("_buffers", {}) or "_layer" not in self.__dict__:
            return super().__getattr__(name)
        return getattr(self._layer[0], name)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, statistics = normalize_and_measure(
            inputs, self.get_buffer("scale"), self.get_buffer("shift"), **self._options
        )
        self._record(inputs, statistics)
        return outputs


def _affine(layer: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 `[C]`, that a batch norm in evaluation mode applies."""
    deviation = (layer.running_var.double() + layer.eps).sqrt()
    scale = deviation.reciprocal() if layer.weight is None else layer.weight.double() / deviation
    shift = -layer.running_mean.double() * scale
    shift = shift if layer.bias is None else shift + layer.bias.double()
    return scale.float(), shift.float()
