"""PSAQ-ViT: pixels optimised until the patches of an image look as diverse as possible to a vision transformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from synthquant.core.progress import QUIET, Progress
from synthquant.methods import SYNTHESIZERS
from synthquant.synthesize.attentive import AttentiveNetwork
from synthquant.synthesize.batches import Batch, Order, batch_sizes, make_batches, number_of_classes
from synthquant.synthesize.inversion import Advice, ComputeType, Learner, WarmedCosineSchedule, adam, minimize
from synthquant.synthesize.low_pass import LowPass
from synthquant.synthesize.pieces import piece_size
from synthquant.synthesize.priors import total_variations

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel

# The authors' 2,500 to 3,000 for 32 images of 3x224x224, as a share of the root of how many values those are.
_ROUGHNESS = (1.14, 1.37)
_BETAS = (0.5, 0.9)
_WARM_UP = 0.2


@SYNTHESIZERS.register("psaq_vit")
class PsaqVit(LowPass):
    """Patch Similarity Aware Data-Free Quantization for Vision Transformers (arXiv:2203.02250), PSAQ-ViT.

    Minimises over the pixels of each image

        -sum_l H_l + cross_entropy CE + total_variation |TV - tau| - head_similarity S

    with Adam: `H_l` is the entropy of the cosine similarities of patches in what attention `l` puts out, heads averaged
    (`models/patch_similarity.py`, shared with the filter of that name), CE that of a random class, `TV` the total
    variation, `tau` drawn from 1.14 to 1.37 `sqrt(C H W)`. The rate rises over the first fifth of a stage and falls
    along a cosine; in every step each image is rolled by as much along both axes, and mirrored or not; after it pixels
    are cut off at black and white.

    Departures from the authors' code:

    - All terms are those of one image, where its norms of the total variation and its grid for densities belong to a
      batch. Its weight of 0.05 for 32 images is `0.05 sqrt(32)` for one. Each image draws class, start, tau and moves
      by its number in the set: batches of any size make the same images, up to the rounding of floating point.
    - Densities are computed on 512 points between an image's own extremes instead of 10 between the batch's.
    - All tokens that are no patches are dropped, where it drops the first (also in Swin, where that is a patch).
    - Rolls are shares of the side, for images of any size.

    `head_similarity` is a step beyond: `S` is how alike the heads of an attention look (SSIM, averaged over attentions)
    in the way of MimiQ (arXiv:2407.20021), whose windows and constants it does not claim to reproduce.
    """

    needs_attention: ClassVar[bool] = True

    batch_size: int = Field(default=32, ge=1)
    """Images optimised together; they do not influence each other."""

    iterations: int = Field(default=500, ge=1)
    """Optimisation steps in each stage."""

    pixel_lr: float = Field(default=0.2, gt=0)
    """Highest learning rate of the pixels in a stage (normalised space); the paper has 0.25 for Swin."""

    jitter: tuple[float, ...] = Field(default=(0.067, 0.134), min_length=1)
    """Images are rolled by up to such a share of their shorter side, one share for each stage (0.067 of 224: 15)."""

    cross_entropy: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy with random classes, which become the labels of the images; 0: for networks that are
    no classifiers."""

    total_variation: float = Field(default=0.283, ge=0)
    """Weight of the distance of an image's total variation (normalised space) to its target."""

    head_similarity: float = Field(default=0.0, ge=0)
    """Weight of the similarity of heads; 0: no such term."""

    compute_dtype: ComputeType = "float32"
    """Precision of the network's forward and backward pass; entropies, pixels and optimiser are always float32."""

    @field_validator("jitter")
    @classmethod
    def _check_jitter(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= share < 1 for share in shares):
            raise ValueError("a share of a side is at least 0 and below 1")
        return shares

    def synthesize(
        self,
        model: FloatModel,
        count: int,
        rng: Rng,
        *,
        writer: ImageSetWriter | None = None,
        progress: Progress = QUIET,
    ) -> ImageSet:
        """Make exactly `count` images of the model's input size.

        Raises `UnsupportedModelError` for a network without attention between patches, with patches that do not divide
        its images, or that is no classifier if `cross_entropy` needs its classes; `InputError` if `count` is not
        positive or the loss stops being finite.
        """
        sizes = batch_sizes(count, self.batch_size)
        classes = number_of_classes(model) if self.cross_entropy else 0
        network = AttentiveNetwork(
            model,
            method="psaq_vit",
            logits=classes > 0,
            heads=self.head_similarity > 0,
            compute_dtype=self.compute_dtype,
        )
        at_once = piece_size(sizes[0], network.need(), model.device)

        def make_batch(batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
            first = batch.index * self.batch_size
            drawn = [self.drawn(rng.child(f"image-{first + place}"), model, classes) for place in range(batch.size)]
            start = Drawn(*map(torch.stack, zip(*(image.tensors for image in drawn), strict=True)))
            images = self._optimized(network, model, start, at_once, batch)
            return (images, start.label) if classes else images

        order = Order(model, rng, writer, progress)
        steps = self.iterations * len(self.jitter)
        return make_batches("psaq_vit", self, order, sizes, make_batch, iterations=steps)

    def drawn(self, rng: Rng, model: FloatModel, classes: int) -> Drawn:
        """Return all that one image draws, on the CPU.

        Args:
            rng: of this image.
            model: for which network.
            classes: to choose from.
        """
        shape = (model.preprocess.channels, *model.preprocess.input_size)
        moves = rng.generator("jitter")
        offsets = []
        for share in self.jitter:
            most = round(share * min(shape[1:]))
            offsets.append(torch.randint(-most, most + 1, (self.iterations,), generator=moves))
        flips = torch.rand(self.iterations * len(self.jitter), generator=rng.generator("flip")) < 0.5
        low, high = _ROUGHNESS
        roughness = torch.rand((), generator=rng.generator("tau")) * (high - low) + low
        return Drawn(
            pixels=torch.randn(shape, generator=rng.generator("pixels")),
            label=torch.randint(max(classes, 1), (), generator=rng.generator("label")),
            tau=roughness * torch.tensor(shape).prod().sqrt(),
            offsets=torch.cat(offsets),
            flips=flips,
        )

    def _optimized(
        self, network: AttentiveNetwork, model: FloatModel, start: Drawn, at_once: int, batch: Batch
    ) -> Tensor:
        """Return normalised images `[B, C, H, W]` within black and white."""
        pixels, label, tau, offsets, flips = (tensor.to(model.device) for tensor in start.tensors)
        pixels.requires_grad_()
        optimizer, rate = adam([pixels], self.pixel_lr, _BETAS)

        @torch.no_grad()
        def cut_off(*_: object) -> None:
            pixels.copy_(model.preprocess.cut_off(pixels))

        optimizer.register_step_post_hook(cut_off)
        schedule = WarmedCosineSchedule(
            rate, peak=self.pixel_lr, warm_up=int(_WARM_UP * self.iterations), period=self.iterations
        )

        def backward(iteration: int) -> Tensor:
            losses = []
            for first in range(0, batch.size, at_once):
                piece = slice(first, first + at_once)
                images = moved(pixels[piece], offsets[piece, iteration - 1], flips[piece, iteration - 1])
                loss = self.losses(network, images, label[piece], tau[piece])
                torch.autograd.backward(loss.sum())  # so that an image's step does not depend on how many there are
                losses.append(loss.detach())
            return torch.cat(losses).mean()

        minimize(
            backward,
            [Learner(optimizer, schedule)],
            iterations=self.iterations * len(self.jitter),
            advice=Advice(batch.index, f"pixel_lr (now {self.pixel_lr:g})"),
            bar=batch.bar,
        )
        return pixels.detach()

    def losses(self, network: AttentiveNetwork, images: Tensor, label: Tensor, tau: Tensor) -> Tensor:
        """Return what is minimised for each of the normalised images `[B, C, H, W]`, `[B]`.

        Args:
            network: that looks at them.
            images: as it sees them.
            label: their classes, int64 `[B]`.
            tau: their targets of the total variation, `[B]`.
        """
        seen = network(images)
        losses = self.total_variation * (total_variations(images) - tau).abs() - seen.entropies
        if seen.logits is not None:
            losses = losses + self.cross_entropy * F.cross_entropy(seen.logits, label, reduction="none")
        if seen.similarities is not None:
            losses = losses - self.head_similarity * seen.similarities
        return losses


@dataclass(frozen=True)
class Drawn:
    """What images draw before they are optimised, of one image or stacked."""

    pixels: Tensor
    """Normalised noise `[C, H, W]`."""
    label: Tensor
    """Class, int64 `[]`."""
    tau: Tensor
    """Target of the total variation, `[]`."""
    offsets: Tensor
    """By how many pixels the image is rolled in each iteration, int64 `[iterations]`."""
    flips: Tensor
    """Whether it is mirrored, bool `[iterations]`."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields in their order."""
        return self.pixels, self.label, self.tau, self.offsets, self.flips


def moved(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Return images `[B, C, H, W]` rolled by `offsets` (int64 `[B]`) along both axes, then mirrored where `flips` says.

    Nothing waits for the device.
    """
    rows, columns = ((torch.arange(size, device=images.device) - offsets[:, None]) % size for size in images.shape[2:])
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    rolled = images.gather(2, rows[:, None, :, None].expand_as(images))
    return rolled.gather(3, columns[:, None, None, :].expand_as(images))
