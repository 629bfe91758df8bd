"""How diverse the patches of an image look to a vision transformer: what a filter ranks by and synthesis maximises."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from synthquant.models.attention import patch_tokens, patch_weights

_BANDWIDTH = 0.01
_DENSITY_FLOOR = 1e-4
# Of structural similarity, for maps of mean 1 (Wang et al. 2004 with a dynamic range of 1).
_LUMINANCE_FLOOR = 0.01**2
_CONTRAST_FLOOR = 0.03**2


def patch_similarities(output: Tensor, images: int, input_size: tuple[int, int]) -> Tensor | None:
    """Return the cosine similarities of all pairs of patches in what an attention puts out; none if it has no patches.

    Args:
        output: as `patch_tokens` takes it.
        images: `B`.
        input_size: height and width of the network's input [pixels].

    Returns:
        `[B, M]`, one row for each image: `M` is the number of windows times the squared number of patches in one.
    """
    tokens = patch_tokens(output, images, input_size)
    if tokens is None:
        return None
    tokens = F.normalize(tokens, dim=-1)
    return (tokens @ tokens.transpose(1, 2)).reshape(images, -1)


def similarity_entropy(similarities: Tensor, points: int = 512, *, interpolated: bool = False) -> Tensor:
    """Return the entropy [nats] of the density of each row, `[R]`, of cosine similarities `[R, M]`.

    `H = -int f ln f` with a Gaussian kernel density estimate `f` (bandwidth 0.01, plus 1e-4) on `points` grid points
    between the row's own smallest and largest value, by the trapezoidal rule: PSAQ-ViT (arXiv:2203.02250) with its
    constants. The kernel is applied to a histogram of the values on the grid: the cost is that of one pass over the
    values, where the direct sum costs `points` times as much. A row that is not finite gets NaN.

    Args:
        similarities: the rows.
        points: of the grid.
        interpolated: divide each value between the two grid points around it instead of rounding it to the nearest one,
            which makes the entropy differentiable. The ends of the grid have no gradient. Nothing waits for the device.
    """
    values = similarities.detach()
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    step = ((high - low) / (points - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    places = ((similarities - low) / step).nan_to_num()
    counts = _divided(places, points) if interpolated else _rounded(places, points)
    # Circular convolution on twice the points: what wraps around falls outside.
    offsets = torch.arange(2 * points, device=places.device)
    distance = torch.minimum(offsets, 2 * points - offsets) * step / _BANDWIDTH
    kernel = torch.exp(-0.5 * distance.square()) / (_BANDWIDTH * (2 * torch.pi) ** 0.5)
    spectrum = torch.fft.rfft(counts, n=2 * points) * torch.fft.rfft(kernel)
    density = torch.fft.irfft(spectrum, n=2 * points)[:, :points] / similarities.shape[1]
    density = density.clamp(min=0) + _DENSITY_FLOOR
    surprise = -density * density.log()
    entropy: Tensor = (surprise.sum(1) - 0.5 * (surprise[:, 0] + surprise[:, -1])) * step[:, 0]
    return entropy


def _rounded(places: Tensor, points: int) -> Tensor:
    """How many of the places `[R, M]` are nearest to each grid point, `[R, points]`."""
    counts = places.new_zeros(len(places), points)
    return counts.scatter_add_(1, places.round().clamp_(0, points - 1).long(), torch.ones_like(places))


def _divided(places: Tensor, points: int) -> Tensor:
    """The same where a place between two grid points counts for both, the more for the nearer one."""
    lower = places.detach().floor().clamp_(0, points - 2).long()
    share = places - lower
    counts = places.new_zeros(len(places), points).scatter_add(1, lower, 1 - share)
    return counts.scatter_add(1, lower + 1, share)


def head_similarity(weights: Tensor, images: int, input_size: tuple[int, int]) -> Tensor | None:
    """Return how alike the heads of an attention look at the patches of each image, `[B]`, 1 at most; none without.

    The structural similarity (SSIM) of the maps of two heads, averaged over all pairs of heads and over the patches
    that look: inter-head attention similarity after MimiQ (arXiv:2407.20021). A map is what one patch takes of all
    others, divided by its mean; its window is the whole map, so that Swin's windows are compared within themselves.

    Args:
        weights: as `patch_weights` takes them.
        images: `B`.
        input_size: height and width of the network's input [pixels].
    """
    maps = patch_weights(weights, images, input_size)
    if maps is None or maps.shape[1] == 1:
        return None
    maps = maps.transpose(1, 2)  # [B * windows, N, heads, N]
    maps = maps / maps.mean((2, 3), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    means = maps.mean(3, keepdim=True)
    centred = maps - means
    covariances = centred @ centred.transpose(2, 3) / maps.shape[3]  # [B * windows, N, heads, heads]
    variances = covariances.diagonal(dim1=2, dim2=3).unsqueeze(3)
    products = means @ means.transpose(2, 3)
    squares = means.square()
    luminance = (2 * products + _LUMINANCE_FLOOR) / (squares + squares.transpose(2, 3) + _LUMINANCE_FLOOR)
    contrast = (2 * covariances + _CONTRAST_FLOOR) / (variances + variances.transpose(2, 3) + _CONTRAST_FLOOR)
    heads = maps.shape[2]
    similarity = luminance * contrast
    others = similarity.sum((2, 3)) - similarity.diagonal(dim1=2, dim2=3).sum(2)
    return (others / (heads * (heads - 1))).reshape(images, -1).mean(1)
