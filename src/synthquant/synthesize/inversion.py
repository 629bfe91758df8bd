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
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from synthquant.core.clips import save_results
from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.models.batch_norm import is_untrained
from synthquant.models.batch_norm_loss import image_loss
from synthquant.models.watched_batch_norms import WatchedBatchNorms
from synthquant.synthesize.batches import lacking
from synthquant.synthesize.pieces import Need, Pieces, joined, need_of
from synthquant.synthesize.swing import SwingOffsets

if TYPE_CHECKING:
    from synthquant.core.progress import Bar
    from synthquant.models.float_model import FloatModel

Statistics = Literal["batch", "image"]
ComputeType = Literal["float32", "bfloat16"]

ITERATIONS_PER_REPORT = 50
"""Iterations between two looks at the loss; each look waits for the device."""


@dataclass(frozen=True)
class Objective:
    """What is minimised for a batch beside the distance of its statistics; each term is a scalar of the whole batch."""

    of_images: tuple[Callable[[Tensor], Tensor], ...] = ()
    """Terms of the normalised images `[B, C, H, W]`."""
    of_logits: Callable[[Tensor], Tensor] | None = None
    """A term of what the network returns, float32 `[B, classes]`."""
    enhanced: Tensor | None = None
    """int64 `[B]`: the layer whose distance counts twice for each image, where statistics are taken per image."""


_STATISTICS_ALONE = Objective()


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
        self.slack: Tensor | None = None  # `[2, C]`, what the gaps of statistics may be wide
        if is_untrained(model.module) and not untrained:
            raise UnsupportedModelError(
                f"{model.name} looks untrained: no batch norm of it has seen a batch, so {method} has nothing to show;"
                " give --weights FILE, or --set untrained=true to do it anyway"
            )
        self._model = model
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
            raise lacking(method, model, "no batch norm with running statistics", "needs_batch_norm")
        self.swing = SwingOffsets(self._network, model.device) if swing else None

    @property
    def layers(self) -> tuple[tuple[str, int], ...]:
        """Name and channels of the batch norms in the order in which they ran, once the network has run."""
        return self._norms.layers

    def loss(self, images: Tensor, objective: Objective = _STATISTICS_ALONE) -> Tensor:
        """Distance of the statistics of normalised images `[B, C, H, W]` to what the network remembers; a scalar.

        Adds the distance of each image's own statistics to mean 0 and deviation 1, and the terms of the objective.
        """
        seen, _ = self._run(images, objective)
        return self._of_network(seen, objective) + self._of_images(images, objective)

    def backward(self, images: Tensor, objective: Objective = _STATISTICS_ALONE) -> Tensor:
        """Add the gradient of `loss` to whatever `images` were made from, in pieces; returns the loss, detached."""
        parts = list(torch.split(images.detach(), self.pieces.size))
        if len(parts) == 1:
            loss = self.loss(images, objective)
            torch.autograd.backward(loss)
            return loss.detach()
        parts = [part.requires_grad_() for part in parts]
        first_kept = len(parts) - self.pieces.kept
        seen: list[list[Tensor]] = []
        counts: list[Tensor] = []
        for index, part in enumerate(parts):
            of_piece, counted = self._run(part, objective)
            seen.append(of_piece if index >= first_kept else [tensor.detach() for tensor in of_piece])
            counts.append(counted)
        of_pieces = [[tensor.detach().requires_grad_() for tensor in of_piece] for of_piece in seen]
        of_network = self._of_network(self._joined(of_pieces, counts), objective)
        torch.autograd.backward(of_network)
        for index in reversed(range(len(parts))):
            of_piece = seen.pop() if index >= first_kept else self._run(parts[index], objective)[0]
            torch.autograd.backward(of_piece, [tensor.grad for tensor in of_pieces[index]])
        of_images = self._of_images(images, objective)
        gradient = torch.cat([cast(Tensor, part.grad) for part in parts])
        torch.autograd.backward([images, of_images], [gradient, None])
        return (of_network + of_images).detach()

    def need(self, example: Tensor) -> Need:
        """Return what a backward pass takes for each image, measured on a few normalised ones."""
        own = [*self._network.parameters(), *self._network.buffers()]
        images = example.requires_grad_()
        alone = _STATISTICS_ALONE
        return need_of(lambda: self._of_network(self._run(images, alone)[0], alone), len(images), fixed=0, own=own)

    @torch.no_grad()
    def gaps(self, images: Tensor) -> Tensor:
        """How far the statistics of normalised images are from those of the training data, `[2, C]` or `[2, B, C]`."""
        runs = [self._run(part, _STATISTICS_ALONE) for part in torch.split(images, self.pieces.size)]
        (statistics,) = self._joined([seen for seen, _ in runs], [counts for _, counts in runs])
        return self._norms.gaps(statistics)

    def _run(self, images: Tensor, objective: Objective) -> tuple[list[Tensor], Tensor]:
        """What enters the batch norms, `[2, C]` or `[2, B, C]`, and over how many values each is taken, `[C]`.

        With it come the logits, if the objective has a term of them.
        """
        returned: list[Any] = []

        def run() -> None:
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self._half):
                returned.append(self._network(images.contiguous(memory_format=torch.channels_last)))

        statistics, counts = self._norms.statistics(run)
        if objective.of_logits is None:
            return [statistics], counts
        return [statistics, self._model.checked_logits(returned[0], len(images)).float()], counts

    def _joined(self, of_pieces: Sequence[Sequence[Tensor]], counts: Sequence[Tensor]) -> list[Tensor]:
        """What `_run` would return of the whole batch, of what it returned of its pieces."""
        statistics, *logits = zip(*of_pieces, strict=True)
        if self.per_image:
            of_batch = torch.cat(statistics, 1)
        elif len(counts) == 1:
            (of_batch,) = statistics
        else:
            of_batch = joined(torch.stack(statistics), torch.stack(list(counts)), self.epsilon)
        return [of_batch, *(torch.cat(of_logits) for of_logits in logits)]

    def _of_network(self, seen: Sequence[Tensor], objective: Objective) -> Tensor:
        """Loss of what `_run` returned."""
        statistics, *logits = seen
        distance = self._norms.distance(statistics, slack=self.slack, enhanced=objective.enhanced)
        return distance if objective.of_logits is None else distance + objective.of_logits(logits[0])

    def _of_images(self, images: Tensor, objective: Objective) -> Tensor:
        """Loss of what the images are, whatever the network makes of them."""
        loss = image_loss(images, epsilon=self.epsilon)
        for term in objective.of_images:
            loss = loss + term(images)
        return loss


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


class WarmedCosineSchedule:
    """Rises in equal steps to `peak` over `warm_up` iterations, falls to 0 along half a cosine, and starts anew.

    Iteration `i` of each `period`, from 0, has the rate `peak (i + 1) / warm_up` while `i < warm_up`, then
    `peak (1 + cos(pi (i - warm_up) / (period - warm_up))) / 2`.
    """

    def __init__(self, rate: Tensor, *, peak: float, warm_up: int, period: int) -> None:
        """Set the rate of the first iteration."""
        self.rate = rate
        self.peak = peak
        self.warm_up = warm_up
        self.period = period
        self.rate.fill_(self._at(0))

    def step(self, loss: Tensor, iteration: int) -> None:
        """Set the rate of the next iteration."""
        del loss
        self.rate.fill_(self._at(iteration % self.period))

    def _at(self, place: int) -> float:
        if place < self.warm_up:
            return self.peak * (place + 1) / self.warm_up
        share = (place - self.warm_up) / (self.period - self.warm_up)
        return self.peak * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True)
class Learner:
    """An optimiser and the schedule of its learning rate."""

    optimizer: torch.optim.Optimizer
    schedule: Schedule


def adam(
    parameters: Iterable[Tensor], rate: float, betas: tuple[float, float] = (0.9, 0.999)
) -> tuple[torch.optim.Adam, Tensor]:
    """Adam as one fused kernel, and its learning rate: a device scalar that a schedule may change in place."""
    parameters = list(parameters)
    device = parameters[0].device
    learning_rate = torch.tensor(rate, device=device)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=betas, fused=True)
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
    objective: Objective = _STATISTICS_ALONE,
) -> Tensor:
    """Minimise the network's loss over what `make_images` depends on; returns the images of the last forward pass.

    Raises `InputError` if the loss stops being finite.
    """
    images = torch.empty(0)

    def backward(iteration: int) -> Tensor:
        nonlocal images
        del iteration
        if network.swing is not None:
            network.swing.draw(swing_generator)
        images = make_images()
        return network.backward(images, objective)

    minimize(backward, learners, iterations=iterations, advice=advice, bar=bar)
    return images.detach()


def minimize(
    backward: Callable[[int], Tensor], learners: Sequence[Learner], *, iterations: int, advice: Advice, bar: Bar
) -> None:
    """Step down the gradient that `backward` adds to what the learners drive.

    Args:
        backward: called with the number of the iteration, from 1; returns the loss, a detached scalar.
        learners: optimisers whose gradients are none when it is called.
        iterations: how many steps.
        advice: what an error says.
        bar: advanced by one for each of them.

    Raises `InputError` if the loss stops being finite.
    """
    reported = 0
    for iteration in range(1, iterations + 1):
        for learner in learners:
            learner.optimizer.zero_grad(set_to_none=True)
        loss = backward(iteration)
        for learner in learners:
            learner.optimizer.step()
            learner.schedule.step(loss, iteration)
        if iteration in (1, iterations) or iteration % ITERATIONS_PER_REPORT == 0:
            value = float(loss)
            _require_finite(value, iteration, advice)
            bar.advance(iteration - reported, loss=value)
            reported = iteration


def _require_finite(loss: float, iteration: int, advice: Advice) -> None:
    if math.isfinite(loss):
        return
    if iteration == 1:
        raise InputError(
            f"the loss of batch {advice.batch} is {loss} before the first step; check the network's weights and"
            " buffers for values that are not finite, or set compute_dtype to float32"
        )
    raise InputError(f"the loss of batch {advice.batch} is {loss} at iteration {iteration}; lower {advice.settings}")
