"""How diverse the patches of an image look to a vision transformer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import eval_mode
from synthquant.methods import SELECTORS
from synthquant.models.attention import Attentions
from synthquant.models.patch_similarity import patch_similarities, similarity_entropy
from synthquant.select.filter import Filter, unfit

if TYPE_CHECKING:
    from synthquant.methods import Candidates
    from synthquant.models.float_model import FloatModel

_LACKS = "no attention between the patches of an image"


@SELECTORS.register("patch_similarity")
class PatchSimilarity(Filter):
    """Patch similarity filtering of GenQ for vision transformers (arXiv:2312.05272, Eq. 8 and 9).

    Keeps the images of the highest entropy of the cosine similarities between all pairs of an image's patches, summed
    over all attention blocks: noise looks alike everywhere, photographs do not. GenQ names neither the layers nor the
    constants of the density; those of PSAQ-ViT (arXiv:2203.02250) are used: attention times values, averaged over
    heads, without class token. Departures from its code: the grid has `points` points between each image's own extremes
    instead of 10 between the batch's, and with windows (Swin) no patch is dropped for a class token.

    Attention is found by what the network computes, whatever its modules are called: `scaled_dot_product_attention`, a
    product of matrices with a softmax on its left, or `multi_head_attention_forward`. Attention that mixes its heads
    after the softmax (CaiT) is not found.
    """

    keeps_highest: ClassVar[bool] = True

    points: int = Field(default=512, ge=128)
    """Points of the grid that the density is computed on."""

    def supports(self, model: FloatModel) -> bool:
        """Whether patches meet in an attention; runs the network on 2 images of noise."""
        probe = PatchProbe(model, self.points)
        with torch.no_grad(), eval_mode(model.module), probe.watch(2):
            model.logits(model.example_images(2))
        return probe.found

    def probe(self, model: FloatModel) -> PatchProbe:
        """Return what watches the attentions; raises `UnsupportedModelError` if there is none between patches."""
        if not self.supports(model):
            raise unfit(self, model, _LACKS)
        return PatchProbe(model, self.points)

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the entropies; they depend on the image alone."""
        return candidates.table[candidates.chosen, 0].double()


class PatchProbe:
    """Rows of one number: the entropy of patch similarities, summed over attentions."""

    def __init__(self, model: FloatModel, points: int) -> None:
        self.name = f"patch similarity entropy on {points} points"
        self._model_name = model.name
        self._input_size = model.preprocess.input_size
        self._points = points
        self._images = 0
        self._entropy: Tensor | None = None

    @property
    def found(self) -> bool:
        """Whether the pass that was watched last had an attention between patches."""
        return self._entropy is not None

    @contextmanager
    def watch(self, count: int) -> Iterator[None]:
        """Look at every attention of the forward pass."""
        self._images, self._entropy = count, None
        with Attentions(self._add):
            yield

    def rows(self, logits: Tensor) -> Tensor:
        """Return the entropies `[B, 1]`; raises `UnsupportedModelError` if no attention between patches ran."""
        if self._entropy is None:
            raise UnsupportedModelError(f"{self._model_name} has {_LACKS}, which patch_similarity needs")
        return self._entropy[:, None]

    def _add(self, output: Tensor) -> None:
        similarities = patch_similarities(output, self._images, self._input_size)
        if similarities is None:
            return
        entropy = similarity_entropy(similarities, self._points)
        self._entropy = entropy if self._entropy is None else self._entropy + entropy
