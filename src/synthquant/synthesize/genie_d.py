"""Genie-D: optimise a small generator and its latents until the batch norms see the statistics they remember."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.core.progress import QUIET, Progress
from synthquant.core.settings import Settings
from synthquant.methods import SYNTHESIZERS
from synthquant.synthesize.batches import batch_sizes, collect
from synthquant.synthesize.inversion import (
    Advice,
    ComputeType,
    ExponentialSchedule,
    InvertedNetwork,
    Learner,
    PlateauSchedule,
    Statistics,
    adam,
    invert,
)

if TYPE_CHECKING:
    from synthquant.core.progress import Bar
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel


@SYNTHESIZERS.register("genie_d")
class GenieD(Settings):
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
    - Any image size: a size that is not a multiple of 4 is cropped from the next one that is.
    - Nearest upsampling and the 3x3 convolution behind it run as one transposed convolution, which is the same function
      with 4/9 of the operations; the linear layer's outputs are read channels-last, a renaming of random weights.
    - One generator serves all batches: weights and optimiser state are started afresh in place.
    - Strided convolutions called several times in one forward pass share their offset; an axis of length 1 has none.
    """

    needs_batch_norm: ClassVar[bool] = True

    batch_size: int = Field(default=128, ge=1)
    """Images made by one generator, over which the statistics are taken."""

    iterations: int = Field(default=4000, ge=1)
    """Optimisation steps per batch."""

    latent_size: int = Field(default=256, ge=1)
    """Length of a latent."""

    latent_lr: float = Field(default=0.1, gt=0)
    """Learning rate of the latents."""

    latent_patience: int = Field(default=100, ge=0)
    """Iterations without progress after which `latent_lr` falls tenfold, not below 1e-4."""

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
        generator = Generator(self.latent_size, model.preprocess.input_size, model.device)
        with progress.bar(f"genie_d, {len(sizes)} x {self.iterations} iterations", self.iterations * len(sizes)) as bar:
            bar.advance(0 if writer is None else self.iterations * writer.finished_parts)

            def make_batch(index: int, size: int, source: Rng) -> Tensor:
                return self._make_batch(network, generator, index, size, source, bar)

            return collect("genie_d", self, model, sizes, rng, writer, make_batch, progress)

    def _make_batch(
        self, network: InvertedNetwork, generator: Generator, index: int, size: int, source: Rng, bar: Bar
    ) -> Tensor:
        """Train the generator from scratch for one batch; returns normalised images `[size, 3, H, W]`."""
        device = generator.device
        generator.reset(source.generator("generator"))
        latents = torch.randn(size, self.latent_size, generator=source.generator("latents")).to(device).requires_grad_()
        of_latents, latent_rate = adam([latents], self.latent_lr)
        of_generator, generator_rate = adam(generator.parameters(), self.generator_lr)
        decay = ExponentialSchedule(generator_rate, factor=self.generator_decay, every=self.generator_decay_every)

        def make_images() -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.compute_dtype == "bfloat16"):
                images: Tensor = generator(latents)
            return images

        return invert(
            network,
            make_images,
            [
                Learner(of_latents, PlateauSchedule(latent_rate, patience=self.latent_patience)),
                Learner(of_generator, decay),
            ],
            iterations=self.iterations,
            swing_generator=source.generator("swing", device),
            advice=Advice(index, f"generator_lr (now {self.generator_lr:g}) or latent_lr (now {self.latent_lr:g})"),
            bar=bar,
        )


class Generator(nn.Module):
    """Latents `[B, latent_size]` to normalised images `[B, 3, H, W]` with batch mean 0 and deviation 1 per channel.

    Linear to 128 channels at a quarter of the size, batch norm, two upsampling convolutions to 64 and 3 channels with
    batch norm and leaky ReLU between them, tanh, and a batch norm without parameters. Its weights are undefined until
    `reset`.
    """

    def __init__(self, latent_size: int, image_size: tuple[int, int], device: torch.device) -> None:
        super().__init__()
        self.image_size = image_size
        self.start_size = (math.ceil(image_size[0] / 4), math.ceil(image_size[1] / 4))
        self.device = device
        # Built without values: layers would draw theirs from the global random state.
        with torch.device("meta"):
            self.linear = nn.Linear(latent_size, 128 * self.start_size[0] * self.start_size[1])
            self.norm1 = nn.BatchNorm2d(128, track_running_stats=False)
            self.conv1 = UpsampledConv(128, 64)
            self.norm2 = nn.BatchNorm2d(64, track_running_stats=False)
            self.conv2 = UpsampledConv(64, 3)
            self.norm3 = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
        self.to_empty(device=device)

    def reset(self, generator: torch.Generator) -> None:
        """Start afresh in place, with PyTorch's default distributions, from a generator on the CPU."""
        with torch.no_grad():
            for layer in (self.linear, self.conv1, self.conv2):
                bound = 1 / math.sqrt(layer.weight[0].numel())
                for parameter in (layer.weight, layer.bias):
                    values = torch.rand(parameter.shape, generator=generator).mul_(2 * bound).sub_(bound)
                    parameter.copy_(values)
            for norm in (self.norm1, self.norm2):
                norm.reset_parameters()

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents to images, channels-last, float32."""
        height, width = self.start_size
        features = self.linear(latents).view(-1, height, width, 128).permute(0, 3, 1, 2)
        features = self.conv1(self.norm1(features))
        features = F.leaky_relu(self.norm2(features), 0.2, inplace=True)
        images: Tensor = self.norm3(self._crop(self.conv2(features)).float().tanh())
        return images.contiguous(memory_format=torch.channels_last)

    def _crop(self, images: Tensor) -> Tensor:
        height, width = self.image_size
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, top : top + height, left : left + width]


class UpsampledConv(nn.Module):
    """Nearest upsampling by 2, then a 3x3 convolution with padding 1, computed at the low resolution.

    Each output pixel sees at most 2x2 distinct input pixels, so the 3x3 kernel folds into a 4x4 one of a transposed
    convolution with stride 2.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        """Of the 3x3 convolution `[C_out, C_in, 3, 3]`."""
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map `[B, C_in, H, W]` to `[B, C_out, 2H, 2W]`."""
        mirrored = self.weight.flip(2, 3).transpose(0, 1)
        folded = 4 * F.avg_pool2d(F.pad(mirrored, (1, 1, 1, 1)), 2, stride=1)  # sums over 2x2 neighbours
        return F.conv_transpose2d(inputs, folded, self.bias, stride=2, padding=1)
