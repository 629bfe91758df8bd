"""What a vision transformer says of images with gradients: how diverse their patches look, how alike its heads look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from synthquant.core.errors import UnsupportedModelError
from synthquant.models.attention import Attentions
from synthquant.models.patch_similarity import head_similarity, patch_similarities, similarity_entropy
from synthquant.synthesize.batches import lacking
from synthquant.synthesize.pieces import Need, need_of

if TYPE_CHECKING:
    from synthquant.models.float_model import FloatModel
    from synthquant.synthesize.inversion import ComputeType


@dataclass(frozen=True)
class Seen:
    """What a forward pass of `B` images showed; no image's numbers depend on the others."""

    entropies: Tensor
    """Of patch similarities, summed over attentions, `[B]` [nats]."""
    similarities: Tensor | None
    """Of heads, averaged over attentions, `[B]`; none if not asked for."""
    logits: Tensor | None
    """Float32 `[B, classes]`; none if not asked for."""


class AttentiveNetwork:
    """A network whose attentions are watched; it stays as it is.

    Raises `UnsupportedModelError` if no attention runs between the patches of an image, or if a part of each image
    reaches none; if heads are asked for, also if no attention has several. Runs the network on 2 images of noise.
    """

    def __init__(
        self, model: FloatModel, *, method: str, logits: bool, heads: bool, compute_dtype: ComputeType = "float32"
    ) -> None:
        self._model = model
        self._logits = logits
        self._heads = heads
        self._half = compute_dtype == "bfloat16"
        self._entropies: list[Tensor] = []
        self._similarities: list[Tensor] = []
        images = model.example_images(2).requires_grad_()
        with torch.enable_grad():
            self._run(images)
            if not self._entropies:
                lacks = "no attention between the patches of an image (a softmax of patches by patches, times values)"
                raise lacking(method, model, lacks, "needs_attention")
            if heads and not self._similarities:
                raise UnsupportedModelError(
                    f"{model.name} has no attention of several heads, which head_similarity compares; leave it at 0"
                )
            _require_seen(model, images, torch.stack(self._entropies).sum())

    def __call__(self, images: Tensor) -> Seen:
        """Look at normalised images `[B, C, H, W]`."""
        output = self._run(images)
        return Seen(
            entropies=torch.stack(self._entropies).sum(0),
            similarities=torch.stack(self._similarities).mean(0) if self._heads else None,
            logits=self._model.checked_logits(output, len(images)).float() if self._logits else None,
        )

    def need(self) -> Need:
        """Return what a backward pass takes for each image, measured on 2 images of noise."""
        images = self._model.example_images(2).requires_grad_()
        module = self._model.module
        return need_of(lambda: self(images).entropies, 2, fixed=0, own=[*module.parameters(), *module.buffers()])

    def _run(self, images: Tensor) -> object:
        self._entropies, self._similarities = [], []
        size, count = self._model.preprocess.input_size, len(images)

        def see(output: Tensor) -> None:
            similarities = patch_similarities(output, count, size)
            if similarities is not None:
                self._entropies.append(similarity_entropy(similarities, interpolated=True))

        def see_weights(weights: Tensor) -> None:
            similarity = head_similarity(weights, count, size)
            if similarity is not None:
                self._similarities.append(similarity)

        with (
            torch.autocast(images.device.type, torch.bfloat16, enabled=self._half),
            Attentions(see, see_weights if self._heads else None),
        ):
            return self._model.module(images)


def _require_seen(model: FloatModel, images: Tensor, seen: Tensor) -> None:
    """Raise `UnsupportedModelError` if rows or columns at the edge of the images have no part in `seen`."""
    (gradient,) = torch.autograd.grad(seen, images)
    height, width = model.preprocess.input_size
    rows = height - int(gradient.abs().amax((0, 1, 3)).nonzero().amax()) - 1
    columns = width - int(gradient.abs().amax((0, 1, 2)).nonzero().amax()) - 1
    if rows or columns:
        raise UnsupportedModelError(
            f"the patches of {model.name} do not divide its images of {width}x{height} pixels: the last {rows} rows and"
            f" {columns} columns would never be seen; give --input-size a multiple of the patch size"
        )
