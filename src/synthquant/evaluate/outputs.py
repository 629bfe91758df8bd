"""Two networks side by side, output by output: ratios of wholes and of channels, and agreement by their task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from synthquant.models.float_model import Task
from synthquant.models.signature import channel_dim

_MOST_CHANNELS = 128
_WEAK, _BELOW = 10.0, 20.0  # dB: of a channel itself, and below its output, which says nothing about it then


@dataclass
class Ratio:
    """Running sums of one signal-to-noise ratio; kept as float64 tensors, so that no step waits for a GPU."""

    signal: Tensor | float = 0.0
    noise: Tensor | float = 0.0

    def add(self, reference: Tensor, actual: Tensor) -> None:
        """Add the elements of a tensor and of its quantized version."""
        self.signal = self.signal + reference.float().square().sum(dtype=torch.float64)
        self.noise = self.noise + (reference.float() - actual.float()).square().sum(dtype=torch.float64)

    def decibels(self) -> float | None:
        """The ratio [dB]; none where no error was made, or values are not finite."""
        return _decibels(float(self.signal), float(self.noise))


@dataclass(frozen=True)
class OutputSqnr:
    """Ratios of what a network puts out [dB]; none where no error was made, or values are not finite.

    Outputs have names by their way in the output's tree, for example `boxes.0`; the name of a lone tensor is empty.
    """

    total: float | None
    """Over all floating-point tensors of the output: signals and noises of all of them are added."""
    outputs: dict[str, float | None]
    """Of each output."""
    channels: dict[str, list[float | None]] = field(default_factory=dict)
    """Of each channel of outputs that have 2 to 128 of them (`channel_dim`)."""
    agreement: dict[str, dict[str, float]] = field(default_factory=dict)
    """Agreement of each output with the float network's, by its task: `pixels` (share of places with the same highest
    channel) and `miou` (mean over classes of intersection over union), or `correlation` of one channel, for `dense`
    ones; `cosine` (mean over vectors) for `embed`."""

    @property
    def same_answers(self) -> float | None:
        """Mean share of `pixels` over outputs; none if there is no such share."""
        shares = [found["pixels"] for found in self.agreement.values() if "pixels" in found]
        return sum(shares) / len(shares) if shares else None

    @property
    def warnings(self) -> list[str]:
        """One line for each output with a channel that quantization took most of while the whole looks well."""
        found = []
        for name, channels in self.channels.items():
            whole = self.outputs[name]
            known = [(ratio, index) for index, ratio in enumerate(channels) if ratio is not None]
            worst, index = min(known, default=(math.inf, 0))
            if whole is not None and worst < _WEAK and worst < whole - _BELOW:
                found.append(
                    f"output {name or 'of the network'}: channel {index} of {len(channels)} has an SQNR of {worst:.1f}"
                    f" dB, the whole one of {whole:.1f} dB: it is small beside the others and may share a grid with"
                    " them; give the parts outputs of their own, or leave scheme.deploy=full out, which puts grids on"
                    " outputs"
                )
        return found


class ClassOverlap:
    """Adds up how far two maps of classes agree."""

    def __init__(self, classes: int) -> None:
        """Take the number of classes."""
        self._classes = classes
        self._shared = self._either = torch.zeros(classes, dtype=torch.int64)  # places of each class: in both, in one
        self._same = self._places = 0

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add classes, int64 of one shape."""
        first, second = first.flatten(), second.flatten()
        self._same += int((first == second).sum())
        self._places += first.numel()
        counts = [torch.bincount(value, minlength=self._classes) for value in (first[first == second], first, second)]
        self._shared = self._shared + counts[0]
        self._either = self._either + counts[1] + counts[2] - counts[0]

    def shares(self, pixels: str = "pixels") -> dict[str, float]:
        """Return the share of equal places as `pixels`, and `miou`, over classes that are in one of both."""
        if not self._places:
            return {}
        there = self._either > 0
        overlap = self._shared[there].double() / self._either[there]
        return {pixels: self._same / self._places, "miou": float(overlap.mean())}


class OutputSums:
    """Adds up one output, batch by batch."""

    def __init__(self, task: Task) -> None:
        self.ratio = Ratio()
        self._task = task
        self._channels: tuple[Tensor, Tensor] | None = None
        self._overlap: ClassOverlap | None = None
        self._cosines, self._vectors = 0.0, 0
        self._moments = torch.zeros(6, dtype=torch.float64)

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Add what both networks gave for a batch, `[B, ...]`."""
        self.ratio.add(wanted, found)
        wanted, found = wanted.detach().float().cpu(), found.detach().float().cpu()
        dim = channel_dim(wanted)
        if dim is None:
            return
        if 2 <= wanted.shape[dim] <= _MOST_CHANNELS:
            others = [axis for axis in range(wanted.ndim) if axis != dim]
            sums = [value.double().square().sum(others) for value in (wanted, wanted - found)]
            before = self._channels or (torch.zeros(()), torch.zeros(()))
            self._channels = before[0] + sums[0], before[1] + sums[1]
        if self._task == "dense" and wanted.ndim > 2:
            self._add_dense(wanted, found, dim)
        if self._task == "embed":
            cosines = torch.cosine_similarity(wanted, found, dim)
            self._cosines, self._vectors = self._cosines + float(cosines.sum()), self._vectors + cosines.numel()

    def _add_dense(self, wanted: Tensor, found: Tensor, dim: int) -> None:
        classes = wanted.shape[dim]
        if classes == 1:
            x, y = wanted.double().flatten(), found.double().flatten()
            sums = [torch.tensor(float(x.numel())), x.sum(), y.sum(), x @ x, y @ y, x @ y]
            self._moments += torch.stack([value.double() for value in sums])
            return
        self._overlap = self._overlap or ClassOverlap(classes)
        self._overlap.add(wanted.argmax(dim), found.argmax(dim))

    def channels(self) -> list[float | None] | None:
        """Ratio of each channel [dB]; none if there are no or too many channels."""
        if self._channels is None:
            return None
        return [_decibels(float(s), float(n)) for s, n in zip(*self._channels, strict=True)]

    def agreement(self) -> dict[str, float]:
        """As `OutputSqnr.agreement` has it."""
        if self._overlap is not None:
            return self._overlap.shares()
        if self._vectors:
            return {"cosine": self._cosines / self._vectors}
        count, x, y, xx, yy, xy = self._moments.tolist()
        spread = (count * xx - x * x) * (count * yy - y * y)
        return {"correlation": (count * xy - x * y) / math.sqrt(spread)} if spread > 0 else {}


def compare_outputs(pairs: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], task: Task) -> OutputSqnr:
    """Compare what two networks put out, by name, batch for batch: the reference first."""
    total, sums = Ratio(), dict[str, OutputSums]()
    for wanted, found in pairs:
        for name, value in wanted.items():
            sums.setdefault(name, OutputSums(task)).add(value, found[name])
            total.add(value, found[name])
    channels = {name: ratios for name, one in sums.items() if (ratios := one.channels()) is not None}
    agreement = {name: shares for name, one in sums.items() if (shares := one.agreement())}
    outputs = {name: one.ratio.decibels() for name, one in sums.items()}
    return OutputSqnr(total.decibels(), outputs, channels, agreement)


def _decibels(signal: float, noise: float) -> float | None:
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal <= 0 or noise <= 0:
        return None
    return 10 * math.log10(signal / noise)
