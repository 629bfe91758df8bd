"""The learned methods once more, slowly, as the papers write them, for one small network and without the package.

No caches, no shared engine, no custom gradients: every stream is a forward pass from the images, roundings and step
sizes are plain autograd, learning rates are PyTorch's schedules. What is random is handed in: the batches and the masks
that the package drew, in the order in which it drew them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE = "image"
READS = {"stem": IMAGE, "mid": "h", "end": "k", "side": "h"}
"""Which tensor each unit reads. Two read `h`, with one step size, which `mid` learns because it runs first."""
LEARNS = {"mid": "h", "end": "k"}
"""Whose step size a unit may learn; the image's grid is known."""


class FourUnits(nn.Module):
    """A chain of three convolutions, and a fourth that reads what the second reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.mid = nn.Conv2d(4, 4, 3, padding=1)
        self.end = nn.Conv2d(4, 5, 3, padding=1)
        self.side = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        return (self.end(torch.relu(self.mid(h))) + self.side(h)).mean((2, 3))


@dataclass
class Grid:
    """`step * (code - zero)` for codes `0 .. top`."""

    step: Tensor
    zero: Tensor
    top: int

    @classmethod
    def of_weight(cls, weight: Tensor, bits: int) -> Grid:
        """From the smallest to the largest weight of each output channel."""
        top = 2**bits - 1
        low, high = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
        step = ((high - low) / top).view(-1, 1, 1, 1)
        return cls(step, torch.round(-low.view(-1, 1, 1, 1) / step), top)

    @classmethod
    def of_activation(cls, values: Tensor, bits: int) -> Grid:
        """From 0 to the largest value; what the network's units read is never negative."""
        return cls(values.max().view(1) / (2**bits - 1), torch.zeros(1), 2**bits - 1)

    def codes(self, values: Tensor) -> Tensor:
        return torch.clamp(torch.round(values / self.step) + self.zero, 0, self.top)

    def nearest(self, values: Tensor) -> Tensor:
        return self.step * (self.codes(values) - self.zero)


@dataclass
class Pass:
    """One pass over the units, and what a variant of it leaves out."""

    iterations: int
    inputs: str
    activations: bool
    rounding_lr: float = 0.0
    rounding_weight: float = 0.0
    weight_step_lr: float = 0.0
    activation_lr: float = 0.0
    keep: float = 1.0
    lsq_scale: bool = False
    norm: float = 2.0
    calibrated_on: int | None = None
    nearest: tuple[str, ...] = ()
    warm_up: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    without: str = ""


@dataclass
class Trace:
    """What happened to one unit."""

    losses: list[float] = field(default_factory=list)
    loss_start: float = 0.0
    loss_end: float = 0.0
    gradients: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


class SlowMethod:
    """The network, its grids, and the draws that are replayed."""

    def __init__(
        self, network: nn.Module, images: Tensor, bits: tuple[int, int], batches: list[Tensor], masks: list[Tensor]
    ) -> None:
        self.float_weight = {name: network.get_submodule(name).get_parameter("weight").detach() for name in READS}
        self.bias = {name: network.get_submodule(name).get_parameter("bias").detach() for name in READS}
        self.images = images
        self.bits = bits
        self.batches: Iterator[Tensor] = iter(batches)
        self.masks: Iterator[Tensor] = iter(masks)
        self.grid = {name: Grid.of_weight(weight, bits[0]) for name, weight in self.float_weight.items()}
        self.codes = {name: self.grid[name].codes(weight) for name, weight in self.float_weight.items()}
        # From black, -2, to white, 2, whose middle lies between two codes and goes to the even one.
        self.read: dict[str, Grid] = {IMAGE: Grid(torch.tensor([4 / 255]), torch.tensor([128.0]), 255)}

    def weight(self, name: str) -> Tensor:
        return self.grid[name].step * (self.codes[name] - self.grid[name].zero)

    def conv(self, name: str, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, self.bias[name], padding=weight.shape[-1] // 2)

    def run(self, name: str, x: Tensor, *, weights: bool, activations: bool) -> Tensor:
        x = self.read[READS[name]].nearest(x) if activations else x
        return self.conv(name, x, self.weight(name) if weights else self.float_weight[name])

    def stream(self, *, weights: bool, activations: bool, count: int | None = None) -> dict[str, Tensor]:
        """What every unit reads, by a forward pass of the whole network, quantized or not."""
        options = {"weights": weights, "activations": activations}
        x = self.images[:count]
        h = torch.relu(self.run("stem", x, **options))
        k = torch.relu(self.run("mid", h, **options))
        return {IMAGE: x, "h": h, "k": k}

    def set_ranges(self, count: int, *, quantized_weights: bool) -> None:
        seen = self.stream(weights=quantized_weights, activations=False, count=count)
        for name in ("h", "k"):
            self.read[name] = Grid.of_activation(seen[name], self.bits[1])

    def learn(self, phase: Pass) -> dict[str, Trace]:
        return {name: self._learn_unit(name, phase) for name in READS}

    def _learn_unit(self, name: str, phase: Pass) -> Trace:
        trace, tensor = Trace(), READS[name]
        teacher = self.stream(weights=False, activations=False)[tensor]
        activations = phase.activations and phase.without != "activations while caching"
        student = self.stream(weights=True, activations=activations)[tensor]
        target = self.conv(name, teacher, self.float_weight[name])
        source = teacher if phase.inputs == "teacher" else student
        if phase.calibrated_on and name in LEARNS:
            self.read[tensor] = Grid.of_activation(source[: phase.calibrated_on], self.bits[1])

        def hard_error() -> float:
            output = self.run(name, source, weights=True, activations=phase.activations)
            return float((output - target).square().sum(1).mean())

        trace.loss_start = hard_error()
        before = self.codes[name], self.grid[name].step, self.read[tensor].step
        if name not in phase.nearest:
            self._steps(name, phase, teacher, student, target, trace)
        trace.loss_end = hard_error()
        if trace.loss_end > trace.loss_start:  # a unit that got worse is put back
            self.codes[name], self.grid[name].step, self.read[tensor].step = before
        return trace

    def _steps(self, name: str, phase: Pass, teacher: Tensor, student: Tensor, target: Tensor, trace: Trace) -> None:
        grid, read = self.grid[name], self.read[READS[name]]
        ratio = self.float_weight[name] / grid.step
        base = torch.floor(ratio)
        rounding = nn.Parameter(-torch.log(1.2 / (ratio - base + 0.1) - 1))
        share = nn.Parameter(torch.ones_like(grid.step))
        step = nn.Parameter(read.step.clone())
        owns = name in LEARNS
        constant, falling = [], []
        if phase.rounding_lr:
            constant.append({"params": [rounding], "lr": phase.rounding_lr})
        if phase.rounding_lr and phase.weight_step_lr:
            falling.append({"params": [share], "lr": phase.weight_step_lr * min(1.0, 15 / grid.top)})
        if phase.activation_lr and owns:
            falling.append({"params": [step], "lr": phase.activation_lr})
        if not constant and not falling:
            return
        optimizers = [torch.optim.Adam(groups) for groups in (constant, falling) if groups]
        cosine = None
        if falling and phase.without != "cosine":
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[-1], T_max=phase.iterations)
        for t in range(1, phase.iterations + 1):
            batch = next(self.batches)
            x = self._mixed(student[batch], teacher[batch], phase)
            if phase.activations:
                x = self._dropped(x, step, read, phase) if owns else read.nearest(x)
            h = torch.clamp(torch.sigmoid(rounding) * 1.2 - 0.1, 0, 1)
            codes = torch.clamp(base + h + grid.zero, 0, grid.top)
            weight = grid.step * share * (codes - grid.zero) if phase.rounding_lr else self.weight(name)
            difference = (self.conv(name, x, weight) - target[batch]).abs()
            loss = error = difference.pow(phase.norm).sum(1).mean()
            if phase.rounding_lr and (t >= phase.warm_up * phase.iterations or phase.without == "warm-up"):
                loss = error + phase.rounding_weight * (1 - (2 * h - 1).abs() ** self._beta(t, phase)).sum()
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
            if cosine is not None:
                cosine.step()
            trace.losses.append(float(error.detach()))
            if owns and step.grad is not None and phase.activation_lr:
                trace.gradients.append(float(step.grad))
                trace.steps.append(float(step.detach()))
        if phase.activations and owns:
            read.step = step.detach()
        if phase.rounding_lr:
            self.codes[name] = torch.clamp(base + (rounding >= 0) + grid.zero, 0, grid.top)
            grid.step = (grid.step * share).detach()

    @staticmethod
    def _beta(t: int, phase: Pass) -> float:
        start = phase.warm_up * phase.iterations
        share = max(0.0, (t - start) / (phase.iterations - start))
        return phase.beta[0] + (phase.beta[1] - phase.beta[0]) * share

    def _mixed(self, student: Tensor, teacher: Tensor, phase: Pass) -> Tensor:
        """QDrop, arXiv:2203.05740: each element of what a unit reads is the quantized network's or the float one's."""
        if phase.inputs != "mixed":
            return teacher if phase.inputs == "teacher" else student
        mask = next(self.masks).bool()
        if phase.without == "mixing":
            return student
        if phase.without == "order of mixing":
            mask = ~mask
        return torch.where(mask, student, teacher)

    def _dropped(self, x: Tensor, step: Tensor, read: Grid, phase: Pass) -> Tensor:
        """LSQ, arXiv:1902.08153, by straight-through rounding, and QDrop's dropping of it."""
        if phase.lsq_scale:
            scale = 1 / math.sqrt(x.numel() * read.top)
            step = (step - scale * step).detach() + scale * step
        ratio = (x / step).detach()
        rounded = x + step * (torch.round(ratio) - ratio)
        quantized = torch.where(ratio > read.top + 0.5, step * read.top, rounded)
        if phase.keep >= 1:
            return quantized
        mask = next(self.masks).bool()
        return quantized if phase.without == "dropping" else torch.where(mask, quantized, x)
