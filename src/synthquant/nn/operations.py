"""Quantizing what operations inside a module's own `forward` read and put out: sums, products, poolings, activations.

Nothing is traced symbolically and no source is rewritten. A module is given a class derived from its own whose forward
pass runs under a `TorchFunctionMode`; the mode tells operations apart by their name and by how often that name was
called before in the same call of the module (`add_0`, `add_1`). That works when a unit is run alone, under autograd,
in a deep copy, and under `torch.export` with `strict=False`.

Which module an operation belongs to says `models.operation_names`; what hooks of layers and of derived modules run
belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import get_module
from synthquant.models.operation_names import Numbering, operation_name, owns_operations
from synthquant.models.trace import Trace
from synthquant.nn.activation_quantizers import ActivationQuantizer, hand_on
from synthquant.nn.derived import derived_class


class QuantScope(nn.Module):
    """A module whose own operations read or put out quantized tensors.

    Attributes:
        scope_name: module name, for error messages.
        operation_quantizers: quantizers by operation, for example `add_0`. A plain dictionary: containers iterate over
            their children, and these are none.
        operand_quantizers: quantizers of what an operation reads, by operation and by number among its tensors.
        visible: functions that hide operations, as these, by name.
        operation_counts: how often each operation of those names runs in one call.
        watcher: told of each operation whose factors have quantizers, with its name, the function, its arguments before
            they are quantized and its result; what it returns takes the place of the result.
    """

    scope_name: str
    operation_quantizers: dict[str, ActivationQuantizer]
    operand_quantizers: dict[str, dict[int, ActivationQuantizer]]
    visible: Mapping[str, Callable[..., Any]]
    operation_counts: dict[str, frozenset[int]]
    watcher: Callable[..., Any] | None = None

    def quantize_operation(
        self, key: str, quantizer: ActivationQuantizer, counts: Mapping[str, Mapping[str, Collection[int]]]
    ) -> None:
        """Quantize what one operation puts out.

        Args:
            key: name of the operation and number among those of this name, for example `add_0`.
            quantizer: what its result goes through.
            counts: for each module and each name of an operation, how often it ran in a call.
        """
        self.operation_quantizers[key] = quantizer
        self._expect(key, counts)

    def quantize_operand(
        self, key: str, index: int, quantizer: ActivationQuantizer, counts: Mapping[str, Mapping[str, Collection[int]]]
    ) -> None:
        """Quantize what one operation reads.

        Args:
            key: as for `quantize_operation`.
            index: which of the tensors that it is called with.
            quantizer: what that goes through.
            counts: as for `quantize_operation`.
        """
        self.operand_quantizers.setdefault(key, {})[index] = quantizer
        self._expect(key, counts)

    def _expect(self, key: str, counts: Mapping[str, Mapping[str, Collection[int]]]) -> None:
        name = key.rpartition("_")[0]
        self.operation_counts[name] = frozenset(counts[self.scope_name][name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; its hooks are not part of anybody's forward pass."""
        with outside_of_scopes():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with what its operations read and put out quantized.

        Raises:
            UnsupportedModelError: other operations ran than when the quantizers were put in.
        """
        frame = _Frame(self)
        with _running(frame):
            output = super().forward(*args, **kwargs)
        frame.check()
        return output


def watch_operations(
    root: nn.Module, seen: Trace, layers: Collection[str], visible: Mapping[str, Callable[..., Any]]
) -> dict[str, QuantScope]:
    """Let the modules of a network watch their own operations, in place; there are no quantizers yet.

    Args:
        root: the network.
        seen: one forward pass of it.
        layers: names of its layers, which are left alone.
        visible: functions that hide operations, and what runs in their place from now on.

    Returns:
        The modules by name, the root among them.
    """
    scopes = {}
    for name in seen.order:
        part = get_module(root, name)
        if name in layers or not owns_operations(part, root):
            continue
        part.__class__ = derived_class(QuantScope, type(part))
        scope = cast(QuantScope, part)
        scope.scope_name = name
        scope.operation_quantizers = {}
        scope.operand_quantizers = {}
        scope.visible = visible
        scope.operation_counts = {}
        scopes[name] = scope
    return scopes


def activation_quantizers(root: nn.Module) -> list[ActivationQuantizer]:
    """All activation quantizers that run in a call of `root`, each once."""
    found: dict[int, ActivationQuantizer] = {}
    for part in root.modules():
        if isinstance(part, ActivationQuantizer):
            found.setdefault(id(part), part)
        elif isinstance(part, QuantScope):
            operands = (one for quantizers in part.operand_quantizers.values() for one in quantizers.values())
            found.update((id(one), one) for one in (*part.operation_quantizers.values(), *operands))
    return list(found.values())


@contextmanager
def outside_of_scopes() -> Iterator[None]:
    """Let operations belong to nobody for a while."""
    watch = _current.get()
    if watch is None:
        yield
        return
    watch.frames.append(None)
    try:
        yield
    finally:
        watch.frames.pop()


class _Frame:
    """One call of one module: how often each of its operations has run so far."""

    def __init__(self, scope: QuantScope) -> None:
        self._scope = scope
        self._numbering = Numbering()
        self.visible = scope.visible

    def run(self, name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation and quantize what it reads and its result, if it is one of those."""
        if name not in self._scope.operation_counts:
            return function(*args, **kwargs)
        key = self._numbering.take(name)
        given, on_factors = (args, kwargs), self._scope.operand_quantizers.get(key)
        if on_factors is not None:
            args, kwargs = tensors_replaced(on_factors, args, kwargs)
        quantizer = self._scope.operation_quantizers.get(key)
        result = function(*args, **kwargs)
        if on_factors is not None and self._scope.watcher is not None:
            result = self._scope.watcher(key, function, *given, result)
        if quantizer is None:
            return result
        # Some functions return their one tensor in a tuple, with nothing beside it.
        return pytree.tree_map_only(torch.Tensor, partial(hand_on, quantizer), result)

    def check(self) -> None:
        seen = self._numbering.counts
        for name, counts in self._scope.operation_counts.items():
            if seen[name] not in counts:
                raise UnsupportedModelError(
                    f"module {self._scope.scope_name!r} ran {name!r} {seen[name]} times, not {max(counts)} times"
                    " as when it was quantized; a network whose operations change can have neither deploy 'full' nor"
                    " attention quantized: leave scheme.deploy at 'papers' and set scheme.attention to null"
                )


def tensors_replaced(
    changes: Mapping[int, Callable[[torch.Tensor], torch.Tensor]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments of a function with some of the tensors among them, by their number, changed."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    tensors = [position for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for index, change in changes.items():
        leaves[tensors[index]] = change(leaves[tensors[index]])
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


class _Watch(TorchFunctionMode):
    """Hands every torch function to the module whose forward pass is running."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[_Frame | None] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        frame = self.frames[-1]
        if frame is None:
            return func(*args, **(kwargs or {}))
        name = operation_name(func)
        if name in frame.visible:
            with self:  # its steps are operations of the same module
                return frame.visible[name](*args, **(kwargs or {}))
        return frame.run(name, func, args, kwargs or {})


_current: ContextVar[_Watch | None] = ContextVar("synthquant_watch", default=None)


@contextmanager
def _running(frame: _Frame) -> Iterator[None]:
    """Let operations belong to a frame for a while; the outermost one switches the mode on."""
    watch = _current.get()
    if watch is not None:
        watch.frames.append(frame)
        try:
            yield
        finally:
            watch.frames.pop()
        return
    watch = _Watch()
    watch.frames.append(frame)
    token = _current.set(watch)
    try:
        with watch:
            yield
    finally:
        _current.reset(token)
