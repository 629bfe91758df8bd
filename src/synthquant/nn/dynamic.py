"""The kind of quantizer whose range is measured at run time: nothing is calibrated, and nothing is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from synthquant.nn.activation_quantizers import QUANTIZER_KINDS, ActivationQuantizer
from synthquant.nn.functional import fake_quantize
from synthquant.nn.observers import ActivationHistogram, Samples, Watcher, minmax

if TYPE_CHECKING:
    from synthquant.nn.scheme import QuantArgs


def dynamic_quantize(x: torch.Tensor, bits: int, *, symmetric: bool, shared: tuple[int, ...]) -> torch.Tensor:
    """`x` on grids from its smallest to its largest value, one for each place in the other dimensions than `shared`.

    Ranges and codes are computed in float32; zero is a code of every grid.

    Args:
        x: of any shape.
        bits: of one code.
        symmetric: zero in the middle of each grid, or at its lower end where nothing is negative.
        shared: dimensions along which values share a grid.

    Returns:
        The same shape and dtype.
    """
    values = x.float()
    low, high = values.amin(shared, keepdim=True), values.amax(shared, keepdim=True)  # faster than aminmax on CPUs
    ends = low.flatten(), high.flatten()
    scale, zero_point = minmax(Samples(ends[0][:, None], None, *ends), bits, symmetric=symmetric, zero_inside=True)
    grid = scale.reshape(low.shape), zero_point.reshape(low.shape)
    return fake_quantize(values, *grid, 2**bits - 1).to(x.dtype)


@QUANTIZER_KINDS.register("dynamic")
class DynamicQuantizer(ActivationQuantizer):
    """Evenly spaced values from the smallest to the largest of each sample, or with strategy `token` of each token.

    A sample is a place in the first dimension; a token is one in all dimensions but that of the channels.
    """

    strategies = ("tensor", "token")

    def __init__(self, args: QuantArgs) -> None:
        super().__init__(args)
        self.calibrated = self.fixed = True

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded to the grids of its own ranges."""
        shared = (self.channel_dim % x.ndim,) if self.args.strategy == "token" else tuple(range(1, x.ndim))
        return dynamic_quantize(x, self.num_bits, symmetric=self.args.symmetric, shared=shared)

    def quantize_learning(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """The same with the gradient of the identity, since no range cuts anything off, and `x` where `keep` is 0."""
        y = x + (self.quantize(x) - x).detach()
        return y if keep is None else torch.lerp(x, y, keep)

    def keep_legal(self) -> None:
        """Nothing is learned."""

    def new_watcher(self) -> ActivationHistogram:
        """A histogram of all values, which is not used."""
        return ActivationHistogram()

    def set_range(self, watcher: Watcher, observer: str) -> None:
        """Nothing is set."""

    def cover(self, low: float, high: float) -> None:
        """Nothing is set."""

    def candidates(self, low: float, high: float, shares: Iterable[float]) -> Iterator[dict[str, torch.Tensor]]:
        """Nothing but what there is: the range of a tensor is its own."""
        yield {}
