"""DSG: pixels optimised as in ZeroQ, with three parts that keep the images from being all alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from synthquant.core.progress import QUIET, Progress
from synthquant.methods import SYNTHESIZERS
from synthquant.models.batch_norm_loss import TARGET_EPSILON
from synthquant.synthesize.batches import Batch, Order, batch_sizes, make_batches, number_of_classes
from synthquant.synthesize.correlation import Correlation
from synthquant.synthesize.diversity import Diversity
from synthquant.synthesize.inversion import ComputeType, InvertedNetwork, Objective
from synthquant.synthesize.pieces import divided
from synthquant.synthesize.pixels import need_of_pixels, optimized_pixels
from synthquant.synthesize.priors import Smoothness, image_norm
from synthquant.synthesize.slack import Slack

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel


@SYNTHESIZERS.register("dsg")
class DSG(Diversity):
    """Diverse Sample Generation (arXiv:2103.01049, arXiv:2109.00212), DSG in its form for post-training quantization.

    Minimises the distances `d_l` of ZeroQ between each image's statistics and those that batch norm l remembers, with
    three parts, each of which can be switched off by itself:

    - `slack`: slack distribution alignment (SDA). Gaps count only by what they are wider than those of noise.
    - `layer_enhancement`: layer-wise sample enhancement (LSE). Image i minimises `sum_l d_l + d_{i mod L}`.
    - `correlation`: sample correlation inhibition (SCI). The Gram spectrum of a batch is drawn to that of noise.

    The distance of each image itself to mean 0 and deviation 1 stays as in ZeroQ. Where papers and code differ:

    - The code adds cross-entropy with random labels (twice), total variation and the norm of the images. They are no
      part of DSG and off by default; `cross_entropy=1 total_variation=0.07 image_norm=0.01` are the code's weights,
      with the cross-entropy once and total variation per image.
    - LSE: the code doubles a gap before it is squared, so that it counts four times, for 20 images and layers. Here the
      layer's distance counts twice, as in the papers, for any number of layers; images are counted through the whole
      set, so that batches of any size enhance all layers in turns.
    - Pixels start from N(0, 1), as in the papers, where the code's are uniform in 0..1.
    - SCI and SDA: see `Correlation` and `Slack`.
    """

    needs_batch_norm: ClassVar[bool] = True

    batch_size: int = Field(default=64, ge=1)
    """Images optimised together; `correlation` keeps these apart."""

    iterations: int = Field(default=500, ge=1)
    """Optimisation steps per batch."""

    pixel_lr: float = Field(default=0.9, gt=0)
    """Learning rate of the pixels (normalised space)."""

    patience: int = Field(default=260, ge=0)
    """Iterations without progress after which `pixel_lr` falls tenfold, not below 1e-4."""

    slack: Slack | None = Slack()
    """Slack distribution alignment: how far statistics may be off before it counts; none: not at all."""

    layer_enhancement: bool = True
    """Layer-wise sample enhancement: one layer counts twice for each image."""

    correlation: Correlation | None = Correlation()
    """Sample correlation inhibition: images of a batch as little alike as noise; none: no such term."""

    cross_entropy: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy with random classes, which become the labels of the images."""

    total_variation: float = Field(default=0.0, ge=0)
    """Weight of the total variation of normalised images, per image."""

    jitter: int = Field(default=30, ge=0)
    """Images are rolled by up to so many pixels before `total_variation` is taken."""

    image_norm: float = Field(default=0.0, ge=0)
    """Weight of the Euclidean norm of normalised images."""

    compute_dtype: ComputeType = "float32"
    """Precision of the network's forward and backward pass; statistics, pixels and optimiser are always float32."""

    untrained: bool = False
    """Make images of a network none of whose batch norms has seen a batch, though they show nothing of any data."""

    def synthesize(
        self,
        model: FloatModel,
        count: int,
        rng: Rng,
        *,
        writer: ImageSetWriter | None = None,
        progress: Progress = QUIET,
    ) -> ImageSet:
        """Make exactly `count` images of the model's input size; the slack is kept in their manifest.

        Raises `UnsupportedModelError` for a network without batch norm, or one that is no classifier if
        `cross_entropy` needs its classes; `InputError` if `count` is not positive or the loss stops being finite.
        """
        sizes = batch_sizes(count, self.batch_size)
        network = InvertedNetwork(
            model,
            method="dsg",
            statistics="image",
            channel_weights="sum",
            swing=False,
            compute_dtype=self.compute_dtype,
            epsilon=TARGET_EPSILON,
            untrained=self.untrained,
        )
        shape = (model.preprocess.channels, *model.preprocess.input_size)
        need = network.need(model.example_images(2))
        network.pieces = divided(sizes[0], need, need_of_pixels(shape), model.device, progress)
        classes = number_of_classes(model) if self.cross_entropy else 0

        def make_batch(batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
            start = torch.randn(batch.size, *shape, generator=batch.rng.generator("pixels"))
            labels = None
            if classes:
                labels = torch.randint(classes, (batch.size,), generator=batch.rng.generator("labels"))
            images = optimized_pixels(
                network,
                start,
                batch,
                model.device,
                self._objective(network, model, batch, labels),
                iterations=self.iterations,
                pixel_lr=self.pixel_lr,
                patience=self.patience,
            )
            return images if labels is None else (images, labels)

        measured = self.measure(network, model, sizes[0], shape, rng, progress)
        order = Order(model, rng, writer, progress)
        return make_batches("dsg", self, order, sizes, make_batch, iterations=self.iterations, measured=measured)

    def _objective(self, network: InvertedNetwork, model: FloatModel, batch: Batch, labels: Tensor | None) -> Objective:
        """All parts that are switched on, for one batch."""
        objective = self.objective(network, model, batch)
        of_images: list[Callable[[Tensor], Tensor]] = [*objective.of_images]
        if self.total_variation:
            of_images.append(Smoothness(self.total_variation, self.jitter, batch.rng.generator("jitter")))
        if self.image_norm:
            of_images.append(lambda images: self.image_norm * image_norm(images))
        objective = replace(objective, of_images=tuple(of_images))
        if labels is not None:
            wanted = labels.to(model.device)
            objective = replace(
                objective, of_logits=lambda logits: self.cross_entropy * F.cross_entropy(logits, wanted)
            )
        if self.layer_enhancement:
            first = batch.index * self.batch_size
            enhanced = torch.arange(first, first + batch.size, device=model.device) % len(network.layers)
            objective = replace(objective, enhanced=enhanced)
        return objective
