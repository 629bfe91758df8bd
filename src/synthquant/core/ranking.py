"""Which classes a network puts first: the one rule for ties."""

from __future__ import annotations

from torch import Tensor


def top_classes(logits: Tensor, k: int = 1) -> Tensor:
    """Classes with the `k` highest logits, best first; of equal logits the lower class number comes first.

    Integer kernels put out few different logits, so ties are frequent (1 in 100 images at 8 bits). ArgMax in ONNX
    breaks them like this too. What a network's answer is, is asked here everywhere: two networks that put out the same
    logits then have the same answers. NaN counts as the highest.

    Args:
        logits: `[N, classes]`.
        k: how many; all of them if there are fewer.

    Returns:
        Class numbers, int64 `[N, min(k, classes)]`.
    """
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
