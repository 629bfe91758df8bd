"""A tensor that layers read as differences between the steps of a sampler (MoDiff, arXiv:2506.22463)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import keeping_dtype
from synthquant.nn.dynamic import dynamic_quantize
from synthquant.nn.functional import fake_quantize
from synthquant.nn.observers import OBSERVERS, ActivationHistogram
from synthquant.nn.sampler_run import SamplerRun
from synthquant.nn.scheme import QuantArgs

Quantize = Callable[[torch.Tensor], torch.Tensor]


class Reading(nn.Module):
    """A tensor that layers read as differences between the steps of a sampler.

    Attributes:
        args: bits and symmetry of the differences.
        dynamic: ranges are those of each sample's difference; otherwise one grid, `scale` and `zero_point` (`[1]`).
        readers: how many layers read it.
        calibrated: there is a grid, or none is needed.
        enabled: quantize at all.
        watcher: while calibrating, what is shown the differences instead of quantizing them.
        watching_range: the first of its two passes.
        kept: the running sum `r` of what was read, float32, or none outside of sampling.
        steps: how many differences went into it, the first step's tensor among them.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, args: QuantArgs, run: SamplerRun, *, dynamic: bool) -> None:
        super().__init__()
        self.args, self.run, self.dynamic = args, run, dynamic
        self.readers = 0
        self.calibrated = dynamic
        self.enabled = True
        self.watcher: ActivationHistogram | None = None
        self.watching_range = False
        if not dynamic:
            self.register_buffer("scale", torch.ones(1))
            self.register_buffer("zero_point", torch.zeros(1))
        self.start()

    def start(self) -> None:
        """Forget what was read."""
        self.kept: torch.Tensor | None = None
        self.steps = 0
        self.next_step()

    def next_step(self) -> None:
        """The layers may read another tensor from now on."""
        self._taken = 0
        self._release()

    def _release(self) -> None:
        self._given: tuple[torch.Tensor, int] | None = None
        self._difference = torch.empty(0)

    def take(self, x: torch.Tensor, first: Quantize | None) -> torch.Tensor:
        """Read `x` once for all layers of a step and return what they read of it: the quantized difference.

        At the first step that is `x` itself, quantized by `first` if there is one.

        Raises:
            UnsupportedModelError: the layers read different tensors in one step, or it changed its shape.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"{self.run.network}: no gradient passes from one step of a sampler to the next, whose differences its"
                " layers read; sample under torch.no_grad()"
            )
        if self._taken == 0:
            self._given = x, _version(x)
            self._difference = self._read(x, first)
        elif self._given is None or self._given[0] is not x or self._given[1] != _version(x):
            raise UnsupportedModelError(
                f"{self.run.network}: layers that read one tensor when the network was quantized, or a layer that ran"
                " once, read two of them in one step now; put them on the scheme's ignore list or leave out modulation"
            )
        difference = self._difference
        self._taken += 1
        if self._taken == self.readers:  # nothing but the sum is kept any longer
            self._release()
        return difference

    @torch.no_grad()
    def _read(self, x: torch.Tensor, first: Quantize | None) -> torch.Tensor:
        self.steps += 1
        if self.kept is None:
            read = _as_multiplied(x if first is None else first(x), x.dtype)
            self.kept = read.to(torch.float32, copy=True)
            return read
        if self.kept.shape != x.shape:
            raise UnsupportedModelError(
                f"{self.run.network}: a layer reads a tensor {list(x.shape)} and read one {list(self.kept.shape)} at"
                " the sampler's step before; modulation needs steps of equal shapes"
            )
        read = _as_multiplied(self._quantized(x.float() - self.kept), x.dtype)
        self.kept.add_(read)
        return read

    def _quantized(self, difference: torch.Tensor) -> torch.Tensor:
        if self.watcher is not None:
            (self.watcher.observe_range if self.watching_range else self.watcher.observe)(difference)
            return difference
        if not self.enabled:
            return difference
        if self.dynamic:
            shared = tuple(range(1, difference.ndim))
            return dynamic_quantize(difference, self.args.num_bits, symmetric=self.args.symmetric, shared=shared)
        return fake_quantize(difference, self.scale.float(), self.zero_point.float(), self.args.quant_max)

    @torch.no_grad()
    def calibrate(self, observer: str) -> None:
        """Set the grid from what the watcher saw, and drop it."""
        assert self.watcher is not None
        search = OBSERVERS.get(observer)
        symmetric = self.args.symmetric
        scale, zero_point = search(self.watcher.samples(), self.args.num_bits, symmetric=symmetric, zero_inside=True)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point.clamp(0, self.args.quant_max))
        self.watcher, self.calibrated = None, True

    def grid(self) -> dict[str, torch.Tensor]:
        """Scale and zero point by name; nothing if ranges are dynamic."""
        return {} if self.dynamic else {"scale": self.scale, "zero_point": self.zero_point}

    def get_extra_state(self) -> torch.Tensor:
        """Whether there is a grid, for `state_dict`."""
        return torch.tensor(self.calibrated)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take up whether `load_state_dict` has copied a grid."""
        self.calibrated = bool(state)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move, but keep float32."""
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Bits and ranges, for `print(model)`."""
        return f"differences, {self.args.num_bits} bits, {'dynamic' if self.dynamic else 'static'}"


def _version(x: torch.Tensor) -> int:
    """How often a tensor was changed in place, where PyTorch counts it."""
    return 0 if x.is_inference() else x._version


def _as_multiplied(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in the dtype of a layer's input, with no more digits than the layer multiplies: autocast takes some off."""
    x = x.to(dtype)
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)).to(dtype) if torch.is_autocast_enabled(kind) else x
