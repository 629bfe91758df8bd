"""Every matrix product of a forward pass: how much it multiplies, where it runs, and which weight it reads.

Seen from below, where all functions have become a few operators (`mm`, `addmm`, `bmm`, `convolution`), so a weight that
a function uses counts like one that a layer uses. Formulas are those of `torch.utils.flop_counter`.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import eval_mode, hooked
from synthquant.models.operation_names import RunningCalls, operation_name
from synthquant.models.signature import Inputs

_aten = torch.ops.aten
# Products for which the counter of torch has no formula.
_MORE: dict[Any, Callable[..., int]] = {
    _aten.mv: lambda matrix, vector, **_: 2 * matrix.numel(),
    _aten.addmv: lambda added, matrix, vector, **_: 2 * matrix.numel(),
    _aten.dot: lambda one, other, **_: 2 * one.numel(),
    _aten._trilinear: lambda one, weight, other, *_, **__: 2 * len(one) * weight.numel(),  # nn.Bilinear
    _aten.addbmm: lambda added, one, other, **_: 2 * one.numel() * other.shape[-1],
}
# They add the product of their second and third argument to the first.
_ADDING = frozenset((_aten.addmm, _aten.baddbmm, _aten.addmv, _aten.addbmm))


@cache
def _formulas() -> Mapping[Any, Callable[..., int]]:
    from torch.utils.flop_counter import flop_registry  # loads triton

    return {**flop_registry, **_MORE}


@dataclass(frozen=True)
class Product:
    """What one function multiplies in a forward pass, over all calls of the module it belongs to.

    Attributes:
        layer: the convolution or linear layer it runs in; none outside of such layers.
        place: module and function with its number in a call of the module, for example `blocks.0.attn.matmul_1`.
        function: name of the function.
        weights: names of the parameters and buffers that are a factor, as they are or as a view; of the second factor
            first, and all names of those that have several.
        macs: multiply-adds for one sample.
    """

    layer: str | None
    place: str
    function: str
    weights: tuple[str, ...]
    macs: int


def find_products(module: nn.Module, examples: Sequence[Inputs], original: nn.Module) -> list[Product]:
    """Run `module` in eval mode without gradients and return its matrix products in execution order.

    The module and its modes are afterwards as before. Fused kernels of attention and recurrent layers are switched off
    meanwhile: they compute the same products and would hide them.

    Args:
        module: the network.
        examples: inputs of two and of three samples: what does not depend on the samples does not grow with them.
        original: the network that `module` is a copy of.

    Raises:
        UnsupportedModelError: a module of the copy computes with parameters of the original.
    """
    two, three = (_count(module, example, original) for example in examples)
    return [Product(*key, 2 * macs - three.get(key, macs)) for key, macs in two.items()]


_Key = tuple[str | None, str, str, tuple[str, ...]]


def _count(module: nn.Module, example: Inputs, original: nn.Module) -> dict[_Key, int]:
    counter = _Counter(module, original)
    parts, inputs = list(module.modules()), example.clone()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(module))
        stack.enter_context(_no_fused_kernels())
        pre, after = [(part, counter.before) for part in parts], [(part, counter.after) for part in parts]
        stack.enter_context(hooked(after, pre=pre))
        stack.enter_context(_Functions(counter))
        stack.enter_context(_Operators(counter))
        inputs.call(module)
    return counter.macs


@contextmanager
def _no_fused_kernels() -> Iterator[None]:
    """Let attention and recurrent layers compute step by step for a while."""
    former = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # the switch of oneDNN talks about other switches
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=False),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(former)


class _Counter:
    """Knows which module and which function are running, and adds up."""

    def __init__(self, module: nn.Module, original: nn.Module) -> None:
        self.macs: dict[_Key, int] = {}
        self.function: str | None = None  # the name of the one that runs, with its number
        self._own = _memories(module)
        self._foreign = {memory: names for memory, names in _memories(original).items() if memory not in self._own}
        self._running = RunningCalls(module)

    def before(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        self._running.start(module)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook."""
        self._running.end(module)

    def enter(self, name: str) -> str | None:
        """A function starts; returns what ran before."""
        former = self.function
        self.function = self._running.take(name) or f"{name}_0"
        return former

    def add(self, packet: Any, tensors: Sequence[Tensor], flops: int) -> None:
        """An operator that multiplies has run."""
        layer, owner = self._running.layer, self._running.owner
        start = 1 if packet in _ADDING else 0
        weights = tuple(name for tensor in reversed(tensors[start : start + 2]) for name in self._held(tensor))
        function = self.function or f"{packet.__name__}_0"
        inside = layer or owner
        place = f"{inside.name}.{function}" if inside is not None and inside.name else function
        key = (None if layer is None else layer.name, place, function.rpartition("_")[0], weights)
        self.macs[key] = self.macs.get(key, 0) + flops // 2

    def require_own(self, tensors: Sequence[Tensor]) -> None:
        """Raise if one of what an operator reads belongs to the original network."""
        for tensor in tensors:
            if tensor.layout == torch.strided and tensor.untyped_storage().data_ptr() in self._foreign:
                *_, (_, _, name) = self._foreign[tensor.untyped_storage().data_ptr()]
                running = self._running.innermost
                where = "" if running is None else running.name
                raise UnsupportedModelError(
                    f"module {where!r} goes on computing with {name} of the network it was copied from, so it cannot be"
                    " quantized: its forward refers to another module by a variable; make it a class whose forward uses"
                    " its own attributes"
                )

    def _held(self, tensor: Tensor) -> Iterator[str]:
        """Names of the parameters and buffers in whose memory a tensor lies."""
        for start, end, name in self._own.get(tensor.untyped_storage().data_ptr(), ()):
            if start <= tensor.data_ptr() < end:
                yield name


def _memories(module: nn.Module) -> Mapping[int, list[tuple[int, int, str]]]:
    """Start, end and name of parameters and buffers, by the address of the memory they lie in."""
    found: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
    parameters = module.named_parameters(remove_duplicate=False)
    for name, tensor in (*parameters, *module.named_buffers(remove_duplicate=False)):
        if tensor.layout == torch.strided and tensor.data_ptr():
            end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
            found[tensor.untyped_storage().data_ptr()].append((tensor.data_ptr(), end, name))
    return dict(found)


class _Functions(TorchFunctionMode):
    """Says which torch function is running; functions called inside one another are seen as one."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        former = self._counter.enter(operation_name(func))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._counter.function = former


class _Dispatch:
    """What a dispatch mode does with an operator; apart from the mode itself, where torch would load its compiler."""

    _counter: _Counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if packet not in _formulas():
            with cast(TorchDispatchMode, self):
                taken_apart = func.decompose(*args, **kwargs)
            if taken_apart is not NotImplemented:
                return taken_apart
        self._counter.require_own(tensors)
        result = func(*args, **kwargs)
        if packet in _formulas():
            self._counter.add(packet, tensors, _formulas()[packet](*args, **kwargs, out_val=result))
        return result


class _Operators(_Dispatch, TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is untyped
    """Hands every operator that multiplies to the counter; others are taken apart as far as torch can."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counter = counter
