"""How diverse images are: how far a network's features of them lie apart, and how many directions these span."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.core.modules import eval_mode, hooked
from synthquant.data.image_set import ImageSet
from synthquant.data.preprocess import input_batches
from synthquant.models.float_model import FloatModel
from synthquant.models.samples import spread

LOOKED_AT = 512
"""Images of a set that are measured, evenly spread; both measures depend on how many there are."""
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Diversity:
    """Of some images, as one network sees them; numbers of different networks do not compare."""

    of: Literal["features", "pixels"]
    """Whether features of the network were compared, or normalised pixels, where it is no classifier."""
    count: int
    """Images."""
    distance: float | None
    """Euclidean distance of two images, averaged over pairs; none for a single one, or values that are not finite."""
    effective_rank: float | None
    """How many directions images span, from 1 (all alike) to their number (all orthogonal); none as above."""

    def row(self) -> dict[str, Any]:
        """Return it as `run.json` holds it."""
        return asdict(self)


def measure_diversity(model: FloatModel, images: ImageSet, *, most: int = LOOKED_AT, batch_size: int = 64) -> Diversity:
    """Return how diverse up to `most` images are to the network; broken ones are left out and noted in the set.

    Features are what the last layer with weights reads, averaged over positions where there are several.
    """
    of_features = model.task == "classify"
    indices = spread(len(images), most)
    rows = []
    for batch in input_batches(images, model.preprocess, batch_size, indices):
        inputs = batch.inputs.to(model.device)
        rows.append((features(model, inputs) if of_features else inputs.flatten(1)).float().cpu())
    vectors = torch.cat(rows) if rows else torch.zeros(0, 1)
    return Diversity(
        "features" if of_features else "pixels", len(vectors), mean_distance(vectors), effective_rank(vectors)
    )


def features(model: FloatModel, images: Tensor) -> Tensor:
    """Return what the last layer with weights reads of normalised images `[B, C, H, W]`: `[B, features]`.

    A classifier without such a layer gives its logits.
    """
    return features_and_logits(model, images)[0]


@torch.no_grad()
def features_and_logits(model: FloatModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the `features` of normalised images `[B, C, H, W]`, and the logits `[B, classes]` of the same pass."""
    read: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        read[:] = [one for one in args[:1] if isinstance(one, Tensor) and len(one) == len(images)] or read

    layers = [module for module in model.module.modules() if isinstance(module, _WEIGHTED)]
    with eval_mode(model.module), hooked(pre=[(layer, look) for layer in layers]):
        logits = model.logits(images)
    found = read[0] if read else logits
    if found.ndim == 4:
        return found.mean((2, 3)), logits
    return (found if found.ndim == 2 else found.flatten(1, -2).mean(1)), logits


def mean_distance(vectors: Tensor) -> float | None:
    """Euclidean distance of two of the vectors `[N, D]`, averaged over all pairs."""
    if len(vectors) < 2 or not bool(torch.isfinite(vectors).all()):
        return None
    # Not by products: equal vectors are to be at distance 0.
    apart = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    return float(apart.double().sum() / (len(vectors) * (len(vectors) - 1)))


def effective_rank(vectors: Tensor) -> float | None:
    """`exp(-sum_k p_k log p_k)` of the eigenvalues `p_k` of a Gram matrix of cosines, as shares of their sum.

    Of vectors `[N, D]`: 1 if they have one direction, N if they are orthogonal (the Vendi score, arXiv:2210.02410). A
    vector of zeros has no direction and does not count.
    """
    if not len(vectors) or not bool(torch.isfinite(vectors).all()):
        return None
    rows = F.normalize(vectors.double(), dim=1)
    values = torch.linalg.eigvalsh(rows @ rows.T).clamp_min(0)
    total = values.sum()
    return float(torch.exp(torch.special.entr(values / total).sum())) if total > 0 else 1.0
