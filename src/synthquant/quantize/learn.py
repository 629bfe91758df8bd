"""Learning the roundings and step sizes of one unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from synthquant.core.rng import Rng
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.functional import SMALLEST_SCALE, rounding_regularizer, undecided_share
from synthquant.nn.layers import QuantLayer
from synthquant.nn.weight_sources import LearnedStep, SoftRounding
from synthquant.quantize.sampler_steps import batches_of_steps

Sampling = Literal["epoch", "permutation", "replacement", "steps"]
# Up to so many bits a weight's scale changes at the full rate.
_COARSE_BITS = 4


@dataclass(frozen=True)
class Phase:
    """One pass over the units: what is learned, from which inputs, and how.

    Attributes:
        name: names the files of this pass.
        iterations: optimisation steps for each unit.
        batch_size: images in a step.
        inputs: what a unit reads while it learns: what the `student` (quantized so far) or the `teacher` (float) gives
            it, or both `mixed` element by element.
        activations: activations are quantized, in the unit and in what precedes it.
        rounding_lr: learning rate of the rounding logits; 0: weights keep their codes.
        rounding_weight: factor of the rounding regulariser.
        warm_up: share of the steps before the regulariser sets in.
        beta: exponent of the regulariser when it sets in and at the last step; linear in between.
        weight_scale_lr: learning rate of the factors of weight scales at up to 4 bits, cosine to 0; at more bits
            as much smaller as the grid is finer. 0: fixed (AdaRound, BRECQ, QDrop).
        weight_lr: learning rate of weights that pass through their rounding (straight-through) in place of rounding
            logits, as a share of their grid's range, cosine to 0; 0: they are not learned.
        activation_scale_lr: learning rate of activation scales, cosine to 0; 0: fixed.
        quantize_probability: probability that a quantized activation, or a student input, is used (QDrop: 0.5).
        lsq_gradient_scale: scale the gradient of activation steps as LSQ does.
        error: registered name of what is minimised (`unit_fit.UNIT_ERRORS`).
        fisher_rank: how many gradients an error of a low-rank Fisher matrix is made of (`fima`).
        norm: exponent of the reconstruction error.
        sampling: how batches are drawn: through shuffled `epoch`s, a fresh `permutation` each step, with
            `replacement`, or with equal shares of all sampler `steps` (samples that name none: a `permutation`).
        fisher: weight the error by squared gradients of the network's output error: `diagonal` or `full`, or empty.
        calibrate_images: images from which activation ranges are set anew at each unit, or none.
        observer: how these ranges are searched.
        unclipped_codes: codes that learning puts beyond the grid are kept as they are.
        skip_first_layer: the network's first layer keeps the codes it has (BRECQ), whatever the unit it is in.
    """

    name: str
    iterations: int
    batch_size: int
    inputs: Literal["student", "teacher", "mixed"]
    activations: bool
    rounding_lr: float
    rounding_weight: float
    warm_up: float
    beta: tuple[float, float]
    weight_scale_lr: float
    weight_lr: float
    activation_scale_lr: float
    quantize_probability: float
    lsq_gradient_scale: bool
    error: str
    fisher_rank: int
    norm: float
    sampling: Sampling
    fisher: Literal["diagonal", "full"] | None
    calibrate_images: int | None
    observer: str
    unclipped_codes: bool
    skip_first_layer: bool


def batches(
    count: int, size: int, sampling: Sampling, generator: torch.Generator, steps: torch.Tensor | None = None
) -> Iterator[torch.Tensor]:
    """Endless batches of exactly `size` indices below `count` (all of them if there are fewer).

    Args:
        count: how many samples there are.
        size: of a batch.
        sampling: how they are drawn, see `Phase`.
        generator: decides.
        steps: the sampler step of each sample, if they name any, `[count]`.
    """
    device, size = generator.device, min(size, count)
    if sampling == "steps" and steps is not None:
        yield from batches_of_steps(steps.to(device), size, generator)
    if sampling == "replacement":
        while True:
            yield torch.randint(count, (size,), device=device, generator=generator)
    rest = torch.empty(0, dtype=torch.int64, device=device)
    while True:
        if sampling != "epoch":
            yield torch.randperm(count, device=device, generator=generator)[:size]
            continue
        if len(rest) < size:
            rest = torch.cat([rest, torch.randperm(count, device=device, generator=generator)])
        yield rest[:size]
        rest = rest[size:]


def reconstruction_error(
    output: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
    channels_last: bool,
    norm: float,
    fisher: torch.Tensor | None = None,
    full: bool = False,
) -> torch.Tensor:
    """Error of a unit's output: summed over channels, mean over images and positions.

    Args:
        output: the unit's tensors.
        target: the float unit's, in the same order; those that are not floating-point carry no error.
        channels_last: channels are the last dimension (tokens) rather than the second (feature maps).
        norm: exponent `p` of `|y - y_target|**p`.
        fisher: weights `g` of the first of them, 1 in quadratic mean (`fisher_weights`), or none.
        full: use `sum(g |y - y_target|)**2` of each image instead of the diagonal `sum(g**2 |y - y_target|**norm)`,
            divided so that errors that are proportional to `g` count as unweighted ones do.
    """
    total = torch.zeros((), device=target[0].device)
    for leaf, wanted in zip(output, target, strict=True):
        if not wanted.is_floating_point():
            continue
        if fisher is not None:
            difference = (leaf - wanted).abs()
            full_error = (difference * fisher).flatten(1).mean(1).square()
            error = full_error if full else difference.pow(norm) * fisher.square()
            fisher = None
        else:
            error = F.mse_loss(leaf, wanted) if norm == 2 else (leaf - wanted).abs().pow(norm)
        total = total + error.mean() * _channels(wanted, channels_last)
    return total


def _channels(tensor: torch.Tensor, last: bool) -> int:
    """How many channels `[B, C]`, `[B, C, ...]` or, if they are last, `[B, ..., C]` has."""
    return tensor.shape[1:].numel() if tensor.ndim < 3 else tensor.shape[-1 if last else 1]


def beta_at(step: int, phase: Phase) -> float:
    """Exponent of the regulariser at a step (1 .. iterations)."""
    first, last = phase.beta
    start = phase.warm_up * phase.iterations
    share = (step - start) / max(phase.iterations - start, 1)
    return last + (first - last) * (1 - min(max(share, 0.0), 1.0))


@dataclass
class Learned:
    """What a unit's learning left behind."""

    undecided: float | None
    steps: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Learnable:
    """What of a unit is learned, and from which error.

    Attributes:
        layers: those of the unit's layers whose roundings are learned; their weights are quantized.
        quantizers: activation quantizers whose grid this unit may learn.
        error_of: reconstruction error of the unit for a batch of image indices, differentiable.
        count: number of images.
        device: where indices are drawn.
        steps: the sampler step of each image, if they are of steps, int64 `[count]`.
    """

    layers: Sequence[QuantLayer]
    quantizers: Sequence[ActivationQuantizer]
    error_of: Callable[[torch.Tensor], torch.Tensor]
    count: int
    device: torch.device
    steps: torch.Tensor | None = None


def learn_unit(phase: Phase, unit: Learnable, rng: Rng, tick: Callable[[int, float | None], None]) -> Learned:
    """Learn roundings and scales of one unit in place.

    Args:
        phase: what is learned and how.
        unit: what it is learned for.
        rng: randomness of this unit.
        tick: called after each step with its number and, now and then, the loss.

    Returns:
        The share of undecided roundings and a sample of the losses.
    """
    layers, quantizers, device = unit.layers, unit.quantizers, unit.device
    sources = _weight_sources(layers, phase)
    rounding = [source for source in sources if isinstance(source, SoftRounding)]
    learned = list(quantizers) if phase.activation_scale_lr else []
    scales = [parameter for quantizer in learned for parameter in quantizer.learnable()]
    factors = [source.factor for source in sources if source.factor.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [soft.logit for soft in rounding], "lr": phase.rounding_lr, "base": 0.0},
        {"params": scales, "lr": phase.activation_scale_lr, "base": phase.activation_scale_lr},
    ]
    for bits in sorted({source.num_bits for source in sources}):
        of_bits = [source for source in sources if source.num_bits == bits]
        if factors:
            rate = phase.weight_scale_lr * min(1.0, _quant_max(_COARSE_BITS) / _quant_max(bits))
            groups.append({"params": [source.factor for source in of_bits], "lr": rate, "base": rate})
        rate = phase.weight_lr * _quant_max(bits)
        weights = [source.learned for source in of_bits if isinstance(source, LearnedStep)]
        groups.append({"params": weights, "lr": rate, "base": rate})
    groups = [group for group in groups if group["params"]]
    if not groups or not phase.iterations:
        return Learned(None, (), ())
    optimizer = torch.optim.Adam(groups, fused=True)
    every = max(1, phase.iterations // 100)
    steps, losses = [], []
    generator = rng.generator("batches", device)
    draw = batches(unit.count, phase.batch_size, phase.sampling, generator, unit.steps)
    try:
        for layer, source in zip(layers, sources, strict=bool(sources)):
            layer.weight_source = source
        with learning(
            quantizers if phase.activations else (),
            scales,
            quantize_probability=phase.quantize_probability,
            lsq_gradient_scale=phase.lsq_gradient_scale,
            generator=rng.generator("drop", device),
        ):
            for step in range(1, phase.iterations + 1):
                for source in sources:
                    source.hold()
                loss = error = unit.error_of(next(draw))
                if rounding and step >= phase.warm_up * phase.iterations:
                    beta = beta_at(step, phase)
                    loss = error + phase.rounding_weight * sum(
                        rounding_regularizer(soft.soft, beta) for soft in rounding
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                _cosine(optimizer, step - 1, phase.iterations)
                optimizer.step()
                _keep_positive(factors)
                for quantizer in learned:
                    quantizer.keep_legal()
                sampled = None
                if step % every == 0 or step in (1, phase.iterations):
                    sampled = float(error.detach())
                if sampled is not None and math.isfinite(sampled):
                    steps.append(step)
                    losses.append(sampled)
                tick(step, sampled)
    except BaseException:
        for layer in layers:
            layer.weight_source = None
        raise
    undecided = undecided_share(torch.cat([soft.undecided() for soft in rounding])) if rounding else None
    for layer in layers if sources else ():
        layer.harden_weight(unclipped=phase.unclipped_codes)
    return Learned(undecided, tuple(steps), tuple(losses))


def _weight_sources(layers: Sequence[QuantLayer], phase: Phase) -> list[SoftRounding | LearnedStep]:
    """What the weights of the layers come from while they are learned; none if they keep their codes."""
    sources: list[SoftRounding | LearnedStep] = []
    for layer in layers if phase.rounding_lr or phase.weight_lr else ():
        assert layer.weight_quantizer is not None
        learn_scale = phase.weight_scale_lr > 0
        if phase.weight_lr:
            step = LearnedStep(layer.weight_quantizer, layer.float_weight, lsq_gradient_scale=phase.lsq_gradient_scale)
            step.factor.requires_grad_(learn_scale)
            sources.append(step)
        else:
            sources.append(SoftRounding(layer.weight_quantizer, layer.float_weight, learn_scale))
    return sources


def _quant_max(bits: int) -> int:
    """The largest code."""
    return int(2**bits - 1)


def _cosine(optimizer: torch.optim.Optimizer, step: int, iterations: int) -> None:
    for group in optimizer.param_groups:
        if group["base"]:
            group["lr"] = group["base"] * 0.5 * (1 + math.cos(math.pi * step / iterations))


@torch.no_grad()
def _keep_positive(scales: Sequence[torch.Tensor]) -> None:
    if scales:
        torch._foreach_clamp_min_(list(scales), SMALLEST_SCALE)


@contextmanager
def undropped(quantizers: Sequence[ActivationQuantizer]) -> Iterator[None]:
    """Let quantizers that learn quantize every value for a while."""
    former = [(quantizer, quantizer.quantize_probability) for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.quantize_probability = 1.0
        yield
    finally:
        for quantizer, probability in former:
            quantizer.quantize_probability = probability


@contextmanager
def learning(
    quantizers: Collection[ActivationQuantizer],
    scales: Sequence[nn.Parameter],
    *,
    quantize_probability: float = 1.0,
    lsq_gradient_scale: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Let gradients pass through quantizers for a while, and reach their scales.

    Args:
        quantizers: those that gradients pass through, with rounding as the identity.
        scales: parameters of quantizers that are learned.
        quantize_probability: probability that a value is quantized at all (QDrop).
        lsq_gradient_scale: scale the gradient of step sizes as LSQ does.
        generator: decides which values are quantized; needed below a probability of 1.
    """
    try:
        for scale in scales:
            scale.requires_grad_(True)
        for quantizer in quantizers:
            quantizer.learning = True
            quantizer.quantize_probability = quantize_probability
            quantizer.lsq_gradient_scale = lsq_gradient_scale
            quantizer.generator = generator
        yield
    finally:
        for scale in scales:
            scale.requires_grad_(False)
            scale.grad = None
        for quantizer in quantizers:
            quantizer.learning = False
            quantizer.quantize_probability = 1.0
            quantizer.generator = None
