"""Genie-D: optimise a small generator and its latents until the batch norms see the statistics they remember."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from synthquant.core.progress import QUIET, Progress
from synthquant.methods import SYNTHESIZERS
from synthquant.synthesize.batches import Batch, Order, batch_sizes, make_batches
from synthquant.synthesize.diversity import Diversity
from synthquant.synthesize.generator import Generator, GeneratorKind, make_generator
from synthquant.synthesize.inversion import (
    Advice,
    ComputeType,
    ExponentialSchedule,
    InvertedNetwork,
    Learner,
    PlateauSchedule,
    Schedule,
    Statistics,
    adam,
    invert,
)
from synthquant.synthesize.pieces import divided, need_of

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel
    from synthquant.synthesize.pieces import Need


@SYNTHESIZERS.register("genie_d")
class GenieD(Diversity):
    """Genie: Show Me the Data for Quantization (arXiv:2212.04780), GENIE-D.

    For each batch a fresh generator and its latents are trained together on
    `sum_l (|mean_l - mean|^2 + |std_l - std|^2) / C_l`: the squared distance, averaged over channels, between the
    batch's statistics at the input of each batch norm and the running ones, plus the distance of each image's own mean
    and deviation to 0 and 1. Strided convolutions read from a random offset (swing convolution). The images are those
    of the last iteration's forward pass, before its step.

    Departures from the authors' code:

    - The rates have the names of what they drive. The code gives `lr_g`, documented as the generator's, to the latents
      and `lr_z` to the generator; the defaults here are the effective values.
    - A remainder of `count` makes a smaller last batch, where the code drops it.
    - Any image size: one that the generator cannot make is cropped from the next one that it can. Above 64 pixels it
      is a lighter generator by default.
    - Nearest upsampling and the 3x3 convolution behind it run as one transposed convolution, which is the same function
      with 4/9 of the operations; the linear layer's outputs are read channels-last, a renaming of random weights.
    - One generator serves all batches: weights and optimiser state are started afresh in place.
    - Strided convolutions called several times in one forward pass share their offset; an axis of length 1 has none.

    `slack` and `correlation` are parts of DSG.
    """

    needs_batch_norm: ClassVar[bool] = True

    batch_size: int = Field(default=128, ge=1)
    """Images made by one generator, over which the statistics are taken; run in pieces where their activations are
    large, which changes the memory and not the loss."""

    iterations: int = Field(default=4000, ge=1)
    """Optimisation steps per batch."""

    generator: GeneratorKind = "auto"
    """The paper's (`genie`); `light`: fewer channels, and maps at a quarter of the size in place of the latents and the
    linear layer that makes such maps of them; or `auto`: the paper's for images of up to 64 pixels, else `light`."""

    latent_size: int = Field(default=256, ge=1)
    """Length of a latent of the paper's generator."""

    latent_lr: float = Field(default=0.1, gt=0)
    """Learning rate of the latents."""

    latent_patience: int = Field(default=100, ge=0)
    """Iterations without progress after which `latent_lr` of the paper's generator falls tenfold, not below 1e-4; that
    of the light one falls as `generator_lr` does."""

    generator_lr: float = Field(default=0.01, gt=0)
    """Learning rate of the generator's weights."""

    generator_decay: float = Field(default=0.95, gt=0, le=1)
    """Factor by which `generator_lr` falls."""

    generator_decay_every: int = Field(default=100, ge=1)
    """Iterations between two falls of `generator_lr`."""

    statistics: Statistics = "batch"
    """Whether statistics are taken over the whole batch ("batch") or over each image ("image")."""

    swing: bool = True
    """Read strided convolutions from a random offset."""

    compute_dtype: ComputeType = "float32"
    """Precision of the networks' forward and backward pass; statistics, weights and optimiser are always float32."""

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
        """Make exactly `count` images of the model's input size.

        Raises `UnsupportedModelError` for a network without batch norm, `InputError` if `count` is not positive or the
        loss stops being finite.
        """
        sizes = batch_sizes(count, self.batch_size)
        network = InvertedNetwork(
            model,
            method="genie_d",
            statistics=self.statistics,
            channel_weights="mean",
            swing=self.swing,
            compute_dtype=self.compute_dtype,
            untrained=self.untrained,
        )
        shape = (model.preprocess.channels, *model.preprocess.input_size)
        generator = make_generator(self.generator, self.latent_size, shape, model.device)
        need = network.need(model.example_images(2))
        network.pieces = divided(sizes[0], need, self._need(generator), model.device, progress)
        order = Order(model, rng, writer, progress)
        make_batch = partial(self._make_batch, network, generator, model)
        measured = self.measure(network, model, sizes[0], shape, rng, progress)
        return make_batches("genie_d", self, order, sizes, make_batch, iterations=self.iterations, measured=measured)

    def _need(self, generator: Generator) -> Need:
        """What the generator and its latents need; values, gradients and Adam's two moments are alike in size."""
        parameters = list(generator.parameters())
        latents = torch.zeros(2, *generator.latent_shape, device=generator.device)
        fixed = 4 * sum(parameter.nbytes for parameter in parameters)
        need = need_of(lambda: self._images(generator, latents), 2, fixed=fixed, own=[*parameters, latents])
        return replace(need, per_image=need.per_image + 4 * latents[0].nbytes)

    def _images(self, generator: Generator, latents: Tensor) -> Tensor:
        with torch.autocast(generator.device.type, torch.bfloat16, enabled=self.compute_dtype == "bfloat16"):
            images: Tensor = generator(latents)
        return images

    def _make_batch(self, network: InvertedNetwork, generator: Generator, model: FloatModel, batch: Batch) -> Tensor:
        """Train the generator from scratch for one batch; returns normalised images `[B, C, H, W]`."""
        device, source = generator.device, batch.rng
        generator.reset(source.generator("generator"))
        latents = torch.randn(batch.size, *generator.latent_shape, generator=source.generator("latents"))
        latents = latents.to(device).requires_grad_()
        of_latents, latent_rate = adam([latents], self.latent_lr)
        of_generator, generator_rate = adam(generator.parameters(), self.generator_lr)
        decays: dict[str, Any] = {"factor": self.generator_decay, "every": self.generator_decay_every}
        # Maps without a linear layer stand for what its weights make, so their rate falls as that of weights does.
        latent_schedule: Schedule = (
            ExponentialSchedule(latent_rate, **decays)
            if generator.linear is None
            else PlateauSchedule(latent_rate, patience=self.latent_patience)
        )
        rates = f"generator_lr (now {self.generator_lr:g}) or latent_lr (now {self.latent_lr:g})"
        return invert(
            network,
            lambda: self._images(generator, latents),
            [
                Learner(of_latents, latent_schedule),
                Learner(of_generator, ExponentialSchedule(generator_rate, **decays)),
            ],
            iterations=self.iterations,
            swing_generator=source.generator("swing", device),
            advice=Advice(batch.index, rates),
            bar=batch.bar,
            objective=self.objective(network, model, batch),
        )
