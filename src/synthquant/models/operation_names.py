"""What an operation is called: the module it belongs to, its function, and its number there, as `layer1.0.add_0`.

An operation belongs to the innermost running module that has children and is no layer: a leaf such as `nn.ReLU`, which
networks often use in several places, counts as code of the module that calls it. Its number says how many functions of
that name the same call of the module ran before, whatever they returned. What runs in layers belongs to nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

QUANTIZABLE = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
"""Kinds of layers whose weights and inputs are quantized."""


def operation_name(function: Callable[..., Any]) -> str:
    """Name of a torch function without underscores at the ends; that of an attribute for what reads it."""
    name: str = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    return name.strip("_")


class Numbering:
    """Tells functions that one call of a module runs apart: its first `add` is `add_0`, its second `add_1`.

    Attributes:
        counts: how often each function ran so far.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def take(self, function: str) -> str:
        """Name a function that runs now."""
        number = self.counts[function]
        self.counts[function] += 1
        return f"{function}_{number}"


@dataclass(frozen=True)
class RunningCall:
    """A running call of a module."""

    module: nn.Module
    name: str
    """Module name; the first one if it has several."""
    index: int
    """Position among all calls, by the time they start."""
    numbering: Numbering | None
    """Of the operations that belong to it; none if none can."""

    @property
    def is_layer(self) -> bool:
        """Whether it is a convolution or linear layer."""
        return isinstance(self.module, QUANTIZABLE)


class RunningCalls:
    """The modules of a network that are running, the innermost last; told by hooks."""

    def __init__(self, root: nn.Module) -> None:
        self._names = {id(part): name for name, part in root.named_modules()}
        self._root = root
        self._started = 0
        self._running: list[RunningCall] = []

    def start(self, module: nn.Module) -> RunningCall:
        """A module starts."""
        numbering = Numbering() if owns_operations(module, self._root) else None
        call = RunningCall(module, self._names[id(module)], self._started, numbering)
        self._started += 1
        self._running.append(call)
        return call

    def end(self, module: nn.Module) -> RunningCall:
        """A module has returned; so have those inside whose forward raised what the network caught itself."""
        while True:
            call = self._running.pop()
            if call.module is module:
                return call

    @property
    def innermost(self) -> RunningCall | None:
        """The innermost running call; none if nothing runs."""
        return self._running[-1] if self._running else None

    @property
    def layer(self) -> RunningCall | None:
        """The innermost running layer; none outside of layers."""
        return next((call for call in reversed(self._running) if call.is_layer), None)

    @property
    def owner(self) -> RunningCall | None:
        """The call that an operation of this moment belongs to; none in layers, and if nothing runs."""
        if self.layer is not None:
            return None
        return next((call for call in reversed(self._running) if call.numbering is not None), None)

    def take(self, function: str) -> str | None:
        """Name a function that runs now by its owner; none if it has no owner."""
        owner = self.owner
        return None if owner is None or owner.numbering is None else owner.numbering.take(function)


def owns_operations(module: nn.Module, root: nn.Module) -> bool:
    """Whether operations can belong to a module of the network `root`."""
    if isinstance(module, QUANTIZABLE):
        return False
    return module is root or next(module.children(), None) is not None
