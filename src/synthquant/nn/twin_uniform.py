"""PTQ4ViT's kind of quantizer, for what a softmax or a GELU puts out: two ranges, each with a step of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from synthquant.nn.activation_quantizers import QUANTIZER_KINDS, ActivationQuantizer
from synthquant.nn.functional import SMALLEST_SCALE, learned_step_quantize
from synthquant.nn.observers import EXPONENT, ActivationHistogram, Watcher

if TYPE_CHECKING:
    from synthquant.nn.scheme import QuantArgs

GELU_MINIMUM = -0.16997124
"""The smallest value of the GELU."""
_SPLITS = tuple(2.0**-power for power in range(20))
_SHARES = tuple(1 - step / 100 for step in range(100))


@QUANTIZER_KINDS.register("twin_uniform")
class TwinUniformQuantizer(ActivationQuantizer):
    """Twin uniform quantization (PTQ4ViT, arXiv:2111.12293, section 3.2) as the paper defines it: piecewise.

    With `Q = 2**(bits - 1)`, one bit of a code says which of two ranges a value lies in, the others how far. A tensor
    without negative values has the softmax's form: values below `split` in steps of `split / (Q - 1)`, those from it on
    in steps of `1 / (Q - 1)`, up to 1. The split is a power of two, so that a shift aligns products of the two. A
    tensor with negative values has the GELU's form: these in steps of the GELU's minimum over `Q`, the others in steps
    that fit them, up to `Q - 1` of them. Where values go beyond 1 or below that minimum, the range reaches to them.

    The released code of the softmax's form adds what both ranges make of a value, which counts it twice.

    Attributes:
        scale: the two steps, that of the small or negative values first, `[2]`.
        split: where the second range begins, `[1]`; 0 in the GELU's form.
    """

    split: torch.Tensor

    def __init__(self, args: QuantArgs) -> None:
        super().__init__(args)
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("split", torch.zeros(1))
        self._half = 2 ** (args.num_bits - 1)
        self._first = (float(-self._half), 0.0)  # multiples of the first step, its smallest and largest

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded to the grid of its range."""
        first, second = (torch.round(x / step) for step in self.scale)
        small = torch.clamp(first, *self._first) * self.scale[0]
        return torch.where(x < self.split, small, torch.clamp(second, 0, self._half - 1) * self.scale[1])

    def quantize_learning(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """The same with LSQ's gradients for each range, and `x` itself where `keep` is 0."""
        small = learned_step_quantize(x, self.scale[:1], *self._first)
        y = torch.where(x < self.split, small, learned_step_quantize(x, self.scale[1:], 0.0, self._half - 1.0))
        return y if keep is None else torch.lerp(x, y, keep)

    def new_watcher(self) -> ActivationHistogram:
        """A histogram of all values."""
        return ActivationHistogram()

    def set_range(self, watcher: Watcher, observer: str) -> None:
        """The split, or the positive step, with the smallest mean of `|x - x_hat|**2.4`, whatever the observer."""
        samples = cast(ActivationHistogram, watcher).samples()
        counts = 1 if samples.counts is None else samples.counts
        best, least = None, float("inf")
        ends = float(samples.low) * self.headroom, float(samples.high) * self.headroom
        for grid in self.candidates(*ends, _SHARES):
            self.load_grid(grid)
            error = float(((self.quantize(samples.values) - samples.values).abs() ** EXPONENT * counts).sum())
            if best is None or error < least:
                best, least = grid, error
        if best is not None:
            self.load_grid(best)

    def cover(self, low: float, high: float) -> None:
        """Span the range from `low` to `high`; in the softmax's form split it at `2**-(bits // 2)` of its end."""
        self._set(low, high, 2.0 ** -(self.num_bits // 2))

    def candidates(self, low: float, high: float, shares: Iterable[float]) -> Iterator[dict[str, torch.Tensor]]:
        """In the softmax's form splits at 1, 1/2 .. 2**-19 of the range, in the GELU's shares of its upper end."""
        if low < 0:
            for share in shares:
                self._set(low, high * share, 0.0)
                yield {name: tensor.clone() for name, tensor in self.grid().items()}
            return
        for split in _SPLITS:
            self._set(low, high, split)
            yield {name: tensor.clone() for name, tensor in self.grid().items()}

    @torch.no_grad()
    def _set(self, low: float, high: float, split: float) -> None:
        """Take the form and the steps for a range, split at a share of its end in the softmax's form."""
        if low < 0:
            split, steps = 0.0, (max(-low, -GELU_MINIMUM) / self._half, high / (self._half - 1))
        else:
            end = max(high, 1.0)
            split, steps = split * end, (split * end / (self._half - 1), end / (self._half - 1))
        grid = self.scale.new_tensor([max(step, SMALLEST_SCALE) for step in steps])
        self.load_grid({"scale": grid, "split": self.split.new_tensor([split])})

    @torch.no_grad()
    def load_grid(self, grid: Mapping[str, torch.Tensor]) -> None:
        """Take a grid that `grid` gave."""
        super().load_grid(grid)
        softmax = float(self.split) > 0
        self._first = (0.0, self._half - 1.0) if softmax else (float(-self._half), 0.0)
