"""Inversion of a trained network: optimise images until its batch norms see the statistics they remember.

One loop serves all methods. What differs is what is optimised (pixels, or a generator and its latents), over what the
statistics are taken, and how the learning rates fall. Nothing in a step waits for the device: losses, learning rates
and swing offsets stay there, so that a step can be recorded in a CUDA graph.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from synthquant.core.clips import save_results
from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.models.batch_norm import is_untrained
from synthquant.models.batch_norm_loss import image_loss
from synthquant.models.watched_batch_norms import WatchedBatchNorms
from synthquant.synthesize.batches import no_batch_norm
from synthquant.synthesize.pieces import Need, Pieces, joined, need_of
from synthquant.synthesize.swing import SwingOffsets

if TYPE_CHECKING:
    from synthquant.core.progress import Bar
    from synthquant.models.float_model import FloatModel

Statistics = Literal["batch", "image"]
ComputeType = Literal["float32", "bfloat16"]

ITERATIONS_PER_REPORT = 50
"""Iterations between two looks at the loss; each look waits for the device."""


class InvertedNetwork:
    """A private copy of a network that measures what enters its batch norms; the original stays untouched.

    The copy has no parameter gradients and channels-last weights. With `compute_dtype` bfloat16 it runs under autocast;
    batch norms and the statistics stay in float32.

    Raises `UnsupportedModelError` if no batch norm keeps running statistics, or none has seen a batch, unless it may be
    `untrained`.
    """

    def __init__(
        self,
        model: FloatModel,
        *,
        method: str,
        statistics: Statistics,
        channel_weights: Literal["mean", "sum"],
        swing: bool,
        compute_dtype: ComputeType = "float32",
        epsilon: float = 0.0,
        untrained: bool = False,
    ) -> None:
        self.per_image = statistics == "image"
        self.epsilon = epsilon
        self._half = compute_dtype == "bfloat16"
        self.pieces = Pieces()  # in which `backward` takes a batch
        if is_untrained(model.module) and not untrained:
            raise UnsupportedModelError(
                f"{model.name} looks untrained: no batch norm of it has seen a batch, so {method} has nothing to show;"
                " give --weights FILE, or --set untrained=true to do it anyway"
            )
        self._network = copy.deepcopy(model.module).eval().requires_grad_(False)
        _to_channels_last(self._network)
        save_results(self._network)
        self._norms = WatchedBatchNorms(
            self._network,
            name=model.name,
            per_image=self.per_image,
            channel_weights=channel_weights,
            epsilon=epsilon,
        )
        if not self._norms.names:
            raise no_batch_norm(method, model)
        self.swing = SwingOffsets(self._network, model.device) if swing else None

    def loss(self, images: Tensor) -> Tensor:
        """Distance of the statistics of normalised images `[B, C, H, W]` to what the network remembers; a scalar.

        Adds the distance of each image's own statistics to mean 0 and deviation 1.
        """
        statistics, _ = self._statistics(images)
        return self._distance(statistics) + image_loss(images, epsilon=self.epsilon)

    def backward(self, images: Tensor) -> Tensor:
        """Add the gradient of `loss` to whatever `images` were made from, in pieces; returns the loss, detached."""
        parts = list(torch.split(images.detach(), self.pieces.size))
        if len(parts) == 1:
            loss = self.loss(images)
            torch.autograd.backward(loss)
            return loss.detach()
        parts = [part.requires_grad_() for part in parts]
        first_kept = len(parts) - self.pieces.kept
        seen: list[Tensor] = []
        counts: list[Tensor] = []
        for index, part in enumerate(parts):
            statistics, counted = self._statistics(part)
            seen.append(statistics if index >= first_kept else statistics.detach())
            counts.append(counted)
        of_pieces = [statistics.detach().requires_grad_() for statistics in seen]
        if self.per_image:
            of_batch = torch.cat(of_pieces, 1)
        else:
            of_batch = joined(torch.stack(of_pieces), torch.stack(counts), self.epsilon)
        of_layers = self._distance(of_batch)
        torch.autograd.backward(of_layers)
        for index in reversed(range(len(parts))):
            statistics = seen.pop() if index >= first_kept else self._statistics(parts[index])[0]
            torch.autograd.backward(statistics, of_pieces[index].grad)
        of_images = image_loss(images, epsilon=self.epsilon)
        gradient = torch.cat([cast(Tensor, part.grad) for part in parts])
        torch.autograd.backward([images, of_images], [gradient, None])
        return (of_layers + of_images).detach()

    def need(self, example: Tensor) -> Need:
        """Return what a backward pass takes for each image, measured on a few normalised ones."""
        own = [*self._network.parameters(), *self._network.buffers()]
        images = example.requires_grad_()
        return need_of(lambda: self._distance(self._statistics(images)[0]), len(images), fixed=0, own=own)

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What enters the batch norms, `[2, C]` or `[2, B, C]`, and over how many values each is taken, `[C]`."""

        def run() -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self._half):
                self._network(images.contiguous(memory_format=torch.channels_last))

        return self._norms.statistics(run)

    def _distance(self, statistics: Tensor) -> Tensor:
        return self._norms.distance(statistics)


def _to_channels_last(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


class Schedule(Protocol):
    """Sets a learning rate after each iteration."""

    def step(self, loss: Tensor, iteration: int) -> None:
        """Take the loss (a device scalar, not to be read here) of iteration 1, 2, ..."""
        ...


class PlateauSchedule:
    """`torch.optim.lr_scheduler.ReduceLROnPlateau` with its state on the device, where it costs no synchronisation.

    The rate falls by `factor`, not below `minimum`, when the loss has not improved by 1e-4 of its best for more than
    `patience` iterations.
    """

    def __init__(self, rate: Tensor, *, patience: int = 100, factor: float = 0.1, minimum: float = 1e-4) -> None:
        self.rate = rate
        self.patience = patience
        self.factor = factor
        self.minimum = minimum
        self._best = torch.full_like(rate, math.inf)
        self._waited = torch.zeros_like(rate)

    def step(self, loss: Tensor, iteration: int) -> None:
        """Lower the rate if the loss has stopped falling."""
        del iteration
        with torch.no_grad():
            better = loss < self._best * (1 - 1e-4)
            self._best.copy_(torch.where(better, loss, self._best))
            self._waited.add_(1).mul_(~better)
            lower = self._waited > self.patience
            lowered = torch.minimum(self.rate, (self.rate * self.factor).clamp_min(self.minimum))
            self.rate.copy_(torch.where(lower, lowered, self.rate))
            self._waited.mul_(~lower)


class ExponentialSchedule:
    """Multiplies the rate by `factor` after every `every` iterations."""

    def __init__(self, rate: Tensor, *, factor: float, every: int) -> None:
        self.rate = rate
        self.factor = factor
        self.every = every

    def step(self, loss: Tensor, iteration: int) -> None:
        """Lower the rate if it is time."""
        del loss
        if iteration % self.every == 0:
            self.rate.mul_(self.factor)


@dataclass(frozen=True)
class Learner:
    """An optimiser and the schedule of its learning rate."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule


def adam(parameters: Iterable[Tensor], rate: float) -> tuple[torch.optim.Adam, Tensor]:
    """Adam as one fused kernel, and its learning rate: a device scalar that a schedule may change in place."""
    parameters = list(parameters)
    device = parameters[0].device
    learning_rate = torch.tensor(rate, device=device)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return optimizer, learning_rate


@dataclass(frozen=True)
class Advice:
    """What an error in a batch says."""

    batch: int
    settings: str
    """Names and values of the settings that make the steps smaller."""


def invert(
    network: InvertedNetwork,
    make_images: Callable[[], Tensor],
    learners: Sequence[Learner],
    *,
    iterations: int,
    swing_generator: torch.Generator,
    advice: Advice,
    bar: Bar,
) -> Tensor:
    """Minimise the network's loss over what `make_images` depends on; returns the images of the last forward pass.

    Raises `InputError` if the loss stops being finite.
    """
    images = torch.empty(0)
    reported = 0
    for iteration in range(1, iterations + 1):
        if network.swing is not None:
            network.swing.draw(swing_generator)
        for learner in learners:
            learner.optimizer.zero_grad(set_to_none=True)
        images = make_images()
        loss = network.backward(images)
        for learner in learners:
            learner.optimizer.step()
            learner.schedule.step(loss, iteration)
        if iteration in (1, iterations) or iteration % ITERATIONS_PER_REPORT == 0:
            value = float(loss)
            _require_finite(value, iteration, advice)
            bar.advance(iteration - reported, loss=value)
            reported = iteration
    return images.detach()


def _require_finite(loss: float, iteration: int, advice: Advice) -> None:
    if math.isfinite(loss):
        return
    if iteration == 1:
        raise InputError(
            f"the loss of batch {advice.batch} is {loss} before the first step; check the network's weights and"
            " batch-norm statistics for values that are not finite, or set compute_dtype to float32"
        )
    raise InputError(f"the loss of batch {advice.batch} is {loss} at iteration {iteration}; lower {advice.settings}")
