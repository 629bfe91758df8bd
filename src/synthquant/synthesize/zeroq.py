"""ZeroQ: optimise pixels until each image has the statistics that the batch norms remember."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from synthquant.core.progress import QUIET, Progress
from synthquant.methods import SYNTHESIZERS
from synthquant.models.batch_norm_loss import TARGET_EPSILON
from synthquant.synthesize.batches import Batch, Order, batch_sizes, make_batches
from synthquant.synthesize.diversity import Diversity
from synthquant.synthesize.inversion import ComputeType, InvertedNetwork, Statistics
from synthquant.synthesize.pieces import divided
from synthquant.synthesize.pixels import need_of_pixels, optimized_pixels

if TYPE_CHECKING:
    from synthquant.core.rng import Rng
    from synthquant.data.image_set import ImageSet
    from synthquant.data.store import ImageSetWriter
    from synthquant.models.float_model import FloatModel


@SYNTHESIZERS.register("zeroq")
class ZeroQ(Diversity):
    """ZeroQ: A Novel Zero Shot Quantization Framework (arXiv:2001.00281), distilled data.

    Minimises over the pixels, with Adam and a falling rate, `sum_l |mean_l(x) - mean_l|^2 + |std_l(x) - std_l|^2`: the
    squared distance, summed over channels and averaged over images, between each image's statistics at the input of
    each batch norm and the running ones, and the same for the image itself with mean 0 and deviation 1.

    Departures from the authors' code:

    - Statistics are those of a batch norm's own input. The code pairs the first L convolutions with L batch norms by
      position, which is wrong for networks with a convolution that has no batch norm.
    - Pixels start from N(0, 1), as in the paper. The code divides by the variance where it means the deviation and
      starts within 0.024 of 0 (`start_std=0.0136` is as narrow).
    - A feature map of 1x1 has deviation 0, where the code divides by zero.
    - As many batches as `count` needs, where the code's script makes one.

    `slack` and `correlation` are parts of DSG; with them images of a batch influence each other.
    """

    needs_batch_norm: ClassVar[bool] = True

    batch_size: int = Field(default=32, ge=1)
    """Images optimised together. They do not influence each other while `statistics` is "image", without
    `correlation`."""

    iterations: int = Field(default=500, ge=1)
    """Optimisation steps per batch."""

    pixel_lr: float = Field(default=0.5, gt=0)
    """Learning rate of the pixels (normalised space)."""

    patience: int = Field(default=100, ge=0)
    """Iterations without progress after which `pixel_lr` falls tenfold, not below 1e-4."""

    start_std: float = Field(default=1.0, ge=0)
    """Deviation of the Gaussian noise that the pixels start from (normalised space)."""

    statistics: Statistics = "image"
    """Whether statistics are taken over each image ("image") or over the whole batch ("batch")."""

    swing: bool = False
    """Read strided convolutions from a random offset (Genie, arXiv:2212.04780)."""

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
        """Make exactly `count` images of the model's input size.

        Raises `UnsupportedModelError` for a network without batch norm, `InputError` if `count` is not positive or the
        loss stops being finite.
        """
        sizes = batch_sizes(count, self.batch_size)
        network = InvertedNetwork(
            model,
            method="zeroq",
            statistics=self.statistics,
            channel_weights="sum",
            swing=self.swing,
            compute_dtype=self.compute_dtype,
            epsilon=TARGET_EPSILON,
            untrained=self.untrained,
        )
        shape = (model.preprocess.channels, *model.preprocess.input_size)
        need = network.need(model.example_images(2))
        network.pieces = divided(sizes[0], need, need_of_pixels(shape), model.device, progress)

        def make_batch(batch: Batch) -> Tensor:
            start = torch.randn(batch.size, *shape, generator=batch.rng.generator("pixels")) * self.start_std
            return optimized_pixels(
                network,
                start,
                batch,
                model.device,
                self.objective(network, model, batch),
                iterations=self.iterations,
                pixel_lr=self.pixel_lr,
                patience=self.patience,
            )

        measured = self.measure(network, model, sizes[0], shape, rng, progress)
        order = Order(model, rng, writer, progress)
        return make_batches("zeroq", self, order, sizes, make_batch, iterations=self.iterations, measured=measured)
