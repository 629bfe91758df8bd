"""Quantized activations: what every kind of quantizer has in common, and the table of kinds.

A kind is a subclass of `ActivationQuantizer` that is registered under the name which `QuantArgs.kind` gives:

    @QUANTIZER_KINDS.register("my_kind")
    class MyQuantizer(ActivationQuantizer): ...

Its parameters and buffers are its grid: checkpoints, snapshots of units and the size of a network are made of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from synthquant.core.modules import keeping_dtype
from synthquant.core.registry import Registry
from synthquant.nn.functional import SMALLEST_SCALE, random_keep
from synthquant.nn.observers import Watcher

if TYPE_CHECKING:
    from synthquant.nn.scheme import QuantArgs


@dataclass(frozen=True)
class AffineGrid:
    """A grid as integer kernels take it: the code `q` of 0 .. `quant_max` stands for `scale * (q - zero_point)`.

    Attributes:
        scale: float32, no dimensions.
        zero_point: a code.
        quant_max: the largest code.
    """

    scale: torch.Tensor
    zero_point: int
    quant_max: int


class ActivationQuantizer(nn.Module, ABC):
    """Fake-quantizes the tensor that passes through it.

    Attributes:
        strategies: what may share one scale in this kind, in the words of `QuantArgs.strategy`.
        affine: the kind has an `affine_grid`; integer kernels know no other.
        non_negative: the kind quantizes only tensors that have no negative values, such as softmaxes.
        whole_numbers: names of the tensors of the grid that hold whole numbers, kept in files as such.
        args: bits and the like.
        calibrated: there is a grid.
        enabled: quantize at all.
        fixed: the grid is known beforehand (the image's) and neither calibrated nor learned.
        channel_dim: the dimension of the channels in what is quantized: the last one, or 1 where convolutions read it.
        headroom: the calibrated range is to be this much wider.
        learning: the grid takes gradients, and values are dropped at random.
        quantize_probability: probability that an element is quantized while learning (QDrop, arXiv:2203.05740: 0.5).
        lsq_gradient_scale: scale gradients of the grid as LSQ does, in kinds that have such a rule.
        generator: source of the drop masks.
        watcher: while calibrating, what is shown the values instead of quantizing them.
        watching_range: the first of its two passes.
    """

    strategies: ClassVar[tuple[str, ...]] = ("tensor",)
    affine: ClassVar[bool] = False
    non_negative: ClassVar[bool] = False
    whole_numbers: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, args: QuantArgs) -> None:
        super().__init__()
        self.args = args
        self.calibrated = False
        self.enabled = True
        self.fixed = False
        self.channel_dim = -1
        self.headroom = 1.0
        self.learning = False
        self.quantize_probability = 1.0
        self.lsq_gradient_scale = False
        self.generator: torch.Generator | None = None
        self.watcher: Watcher | None = None
        self.watching_range = False

    @property
    def num_bits(self) -> int:
        """Bits of one code."""
        return self.args.num_bits

    @abstractmethod
    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded to the grid, same shape and dtype: tensor arithmetic that `torch.export` can follow."""

    @abstractmethod
    def quantize_learning(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        """The same with gradients for `x` and the grid, and `x` itself where `keep`, of its shape, is 0."""

    @abstractmethod
    def new_watcher(self) -> Watcher:
        """What looks at the tensors that the grid is to cover."""

    @abstractmethod
    def set_range(self, watcher: Watcher, observer: str) -> None:
        """Take the grid for what a watcher saw, wider by `headroom`.

        Args:
            watcher: one of this kind's.
            observer: how the range is searched (`observers.OBSERVERS`), for kinds that have a choice.
        """

    @abstractmethod
    def cover(self, low: float, high: float) -> None:
        """Take a grid for values that lie between `low` and `high`."""

    def candidates(self, low: float, high: float, shares: Iterable[float]) -> Iterator[dict[str, torch.Tensor]]:
        """Grids, as `grid` gives them, among which a search for values between `low` and `high` chooses.

        Here the grids that cover these shares of the range; a kind with something else to choose gives its own. The
        quantizer is left with the last of them.
        """
        for share in shares:
            self.cover(low * share, high * share)
            yield {name: tensor.clone() for name, tensor in self.grid().items()}

    def fit_to(self, x: torch.Tensor) -> None:
        """Give the grid the shape that tensors like `x` need; called while the network is built, before all else.

        Raises `SchemeError` if the kind cannot quantize such tensors.
        """

    def affine_grid(self) -> AffineGrid:
        """The grid as integer kernels take it, for kinds that are `affine`."""
        raise NotImplementedError(f"a quantizer of kind {self.args.kind} has no affine grid")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fake-quantized `x`, same shape and dtype; gradients pass to `x` where it lies in the grid's range.

        Raises:
            RuntimeError: used before it was calibrated.
        """
        if self.watcher is not None:
            (self.watcher.observe_range if self.watching_range else self.watcher.observe)(x)
            return x
        if not self.enabled:
            return x
        if not self.calibrated:
            raise RuntimeError("activation quantizer used before it was calibrated")
        if not self.learning:
            return _in_dtype_of(x, self._straight_through(x) if _wants_gradients(x) else self.quantize(x))
        every = self.quantize_probability >= 1
        return self.quantize_learning(x, None if every else random_keep(x, self.quantize_probability, self.generator))

    def _straight_through(self, x: torch.Tensor) -> torch.Tensor:
        """`x` rounded to the grid, to the same bits, with the gradient that `quantize_learning` gives it."""
        y: torch.Tensor = _Replaced.apply(self.quantize_learning(x, None), self.quantize(x.detach()))
        return y

    @torch.no_grad()
    def calibrate(self, observer: str) -> None:
        """Set the grid from what the watcher saw, and drop it.

        Args:
            observer: used where the scheme names none.

        Raises:
            RuntimeError: nothing was observed.
        """
        if self.watcher is None or self.watcher.empty:
            raise RuntimeError("activation quantizer saw no data to calibrate from")
        self.set_range(self.watcher, self.args.observer or observer)
        self.watcher = None
        self.calibrated = True

    @torch.no_grad()
    def fix(self, low: float, high: float) -> None:
        """Cover the range from `low` to `high` for good."""
        self.cover(low, high)
        self.calibrated = self.fixed = True

    def grid(self) -> dict[str, torch.Tensor]:
        """The tensors that the grid consists of, by name; the quantizer's own, without gradients."""
        own = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        return {name: tensor.detach() for name, tensor in own}

    @torch.no_grad()
    def load_grid(self, grid: Mapping[str, torch.Tensor]) -> None:
        """Take a grid that `grid` gave, on any device."""
        for name, tensor in self.grid().items():
            tensor.copy_(grid[name])
        self.calibrated = True

    def get_extra_state(self) -> torch.Tensor:
        """Whether there is a grid, for `state_dict`."""
        return torch.tensor(self.calibrated)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take up the grid that `load_state_dict` has copied, if it is one."""
        if bool(state):
            self.load_grid(self.grid())
        self.calibrated = bool(state)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Move, but keep float32: half precision holds no small steps."""
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def learnable(self) -> list[nn.Parameter]:
        """What reconstruction may learn of the grid."""
        return list(self.parameters())

    @torch.no_grad()
    def keep_legal(self) -> None:
        """Undo what is no grid after an optimiser's step: what is learned stays above zero."""
        torch._foreach_clamp_min_(tuple(self.learnable()), SMALLEST_SCALE)

    def extra_repr(self) -> str:
        """Bits and state, for `print(model)`."""
        return f"{self.num_bits} bits, {'calibrated' if self.calibrated else 'not calibrated'}"


QUANTIZER_KINDS: Registry[type[ActivationQuantizer]] = Registry("quantizer kind", home="synthquant.nn.kinds")


def new_quantizer(args: QuantArgs) -> ActivationQuantizer:
    """A quantizer of the kind that `args` names, not calibrated yet."""
    return QUANTIZER_KINDS.get(args.kind)(args)


def hand_on(quantizer: ActivationQuantizer, x: torch.Tensor) -> torch.Tensor:
    """Quantize a tensor where it is made: later code may overwrite the result, which learning keeps for gradients."""
    y: torch.Tensor = quantizer(x)
    return y.clone() if quantizer.learning or y.requires_grad else y


class _Replaced(torch.autograd.Function):
    """Another value in the place of one, whose gradient it takes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def _wants_gradients(x: torch.Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _in_dtype_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`y` in the dtype of `x`; autocast decides itself."""
    return y if y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)
