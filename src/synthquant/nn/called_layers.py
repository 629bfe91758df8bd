"""Linear layers whose weights a function multiplies, as calls of these layers.

Some modules (torchvision's Swin, timm's BEiT) hand weights of their layers to a function that calls `linear`, some with
a bias that they put together first. The layers never run then, so nothing of them can be quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import get_module
from synthquant.models.operation_names import operation_name
from synthquant.models.signature import Inputs
from synthquant.models.trace import ModuleCall, Operation, Trace, Value
from synthquant.nn.derived import derived_class

_LINEAR = "linear"


class LayerCaller(nn.Module):
    """A module whose calls of `linear` are calls of its layers.

    Attributes:
        called_layers: for each call of `linear` the name of the layer, seen from the module, that runs in its place, or
            none where it is a layer that calls.
    """

    called_layers: tuple[str | None, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, in layers.

        Raises:
            UnsupportedModelError: it calls `linear` more often than it did.
        """
        with _Calls([None if name is None else self.get_submodule(name) for name in self.called_layers]):
            return super().forward(*args, **kwargs)


class _Calls(TorchFunctionMode):
    def __init__(self, layers: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self._layers = iter(layers)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation_name(func) != _LINEAR:
            return func(*args, **kwargs)
        try:
            layer = next(self._layers)
        except StopIteration:
            raise UnsupportedModelError("a module multiplies by more weights than when it was quantized") from None
        return func(*args, **kwargs) if layer is None else layer(args[0] if args else kwargs["input"])


class _Biases(TorchFunctionMode):
    """Keeps the biases that calls of `linear` are given, by the identity of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation_name(func) == _LINEAR:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
            if isinstance(given.get("bias"), Tensor):
                self.found[id(given["weight"])] = given["bias"].detach().clone()
        return func(*args, **kwargs)


def layer_callers(network: nn.Module, seen: Trace) -> dict[str, tuple[str | None, ...]]:
    """Modules that may become `LayerCaller`, and the layers that they are to call.

    A module may if it runs once, all calls of `linear` in it are its own or those of layers, and each of its own
    computes what a layer of the module does that never runs: with a weight that nothing else uses, and a bias that does
    not depend on the network's input.
    """
    found = {}
    functions = [one for one in seen.operations if one.name == _LINEAR]
    for name in dict.fromkeys(seen.module_calls[one.owner].name for one in functions if one.owner is not None):
        calls = seen.calls(name)
        if len(calls) != 1:
            continue
        inside = [one for one in functions if _runs_in(seen, one, calls[0])]
        own = [one for one in inside if one.owner is not None]
        layers = {one.key: _layer_of(network, seen, name, one) for one in own if one.owner == calls[0].index}
        if len(layers) == len(own) and all(layers.values()) and len(set(layers.values())) == len(own):
            found[name] = tuple(None if one.owner is None else layers[one.key] for one in inside)
    return found


def call_layers(network: nn.Module, callers: Mapping[str, tuple[str | None, ...]], example: Inputs | Tensor) -> None:
    """Let modules of a network call these layers, in place; biases that were put together become the layers' own."""
    with torch.no_grad(), _Biases() as biases:
        Inputs.of(example).clone().call(network)
    for name, layers in callers.items():
        part = get_module(network, name)
        for layer in (part.get_submodule(each) for each in layers if each is not None):
            bias = biases.found.get(id(layer.weight))
            if bias is not None:
                layer.bias = nn.Parameter(bias, requires_grad=cast(Tensor, layer.weight).requires_grad)
        part.__class__ = derived_class(LayerCaller, type(part), prefix="Calling")
        cast(LayerCaller, part).called_layers = layers


def _runs_in(seen: Trace, operation: Operation, call: ModuleCall) -> bool:
    return any(one.index == call.index for one in seen.enclosing(operation.call))


def _layer_of(network: nn.Module, seen: Trace, owner: str, operation: Operation) -> str | None:
    """The layer, seen from its owner, that does what a call of `linear` does; none if there is none."""
    bias = operation.inputs[2:]
    if any(value.from_input for value in bias):
        return None
    for name, part in get_module(network, owner).named_modules():
        full = f"{owner}.{name}".strip(".")
        if not isinstance(part, nn.Linear) or type(part).forward is not nn.Linear.forward or seen.calls(full):
            continue
        own = [seen.parameters[f"{full}.{key}"] for key, value in part._parameters.items() if value is not None]
        alone = all(_used_in(seen, owner, value) for value in own)
        if not alone or "weight" not in part._parameters or len(own) > 1 + len(bias):
            continue
        if operation.inputs[1:2] == tuple(own[:1]) and seen.consumers(own[0]) == (operation,):
            return str(name)
    return None


def _used_in(seen: Trace, owner: str, value: Value) -> bool:
    """Whether nothing outside of a module computes with a value."""
    users = seen.consumers(value)
    return all(any(call.name == owner for call in seen.enclosing(user.call)) for user in users)
