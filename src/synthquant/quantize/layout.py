"""Where the channels of a unit's output are: first, as in feature maps, or last, as in tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from synthquant.core.modules import hooked


@torch.no_grad()
def channels_last(layer: nn.Module, run: Callable[[], torch.Tensor]) -> bool:
    """Whether a unit puts out tokens `[B, ..., C]` rather than feature maps `[B, C, ...]`.

    Shapes do not tell: a concatenation has more channels than the layer before it, and a feature map may be as wide as
    a layer has channels. So it is tried out. What the unit's last layer puts out is changed in one channel, and then in
    all channels at one position; the channels of the output lie where the first change reaches few indices and the
    second one many. Where nothing of that is to be seen, the kind of the layer decides.

    Args:
        layer: the unit's layer that runs last.
        run: runs the unit in floating point and gives its output, a fresh tensor each time.
    """
    output = run()
    if output.ndim < 3:
        return True
    shares = []
    for one_channel in (True, False):
        with hooked([(layer, _change(layer, one_channel))]):
            changed = run() != output
        shares.append([_share(changed, dim) for dim in (1, -1)])
    (channel_first, channel_last), (position_first, position_last) = shares
    # Of two ratios the smaller one is where the channels are; compared without dividing by a share of nothing.
    first, last = channel_first * position_last, channel_last * position_first
    return isinstance(layer, nn.Linear) if first == last else last < first


def _change(layer: nn.Module, one_channel: bool) -> Callable[..., torch.Tensor]:
    def hook(_: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        size = 1 + 4 * output.abs().amax()
        dim = -1 if isinstance(layer, nn.Linear) else 1
        change = output.new_zeros(output.movedim(dim, 1).shape)
        if one_channel:
            change[:, 0] = size
        else:
            change.view(*change.shape[:2], -1)[:, :, 0] = size
        return output + change.movedim(1, dim)

    return hook


def _share(changed: torch.Tensor, dim: int) -> float:
    """Share of the indices along a dimension at which anything changed."""
    return float(changed.movedim(dim, 0).flatten(1).any(1).float().mean())
