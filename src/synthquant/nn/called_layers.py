"""Linear layers whose weights a function multiplies, as calls of these layers.

Some modules (torchvision's Swin) hand weights of their layers to a function that calls `linear`. The layers never run
then, so nothing of them can be quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.overrides import TorchFunctionMode

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import get_module
from synthquant.models.operation_names import operation_name
from synthquant.models.trace import ModuleCall, Operation, Trace
from synthquant.nn.derived import derived_class

_LINEAR = "linear"


class LayerCaller(nn.Module):
    """A module whose calls of `linear` are calls of its layers.

    Attributes:
        called_layers: names of these layers, seen from the module, in the order of the calls.
    """

    called_layers: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, in layers.

        Raises:
            UnsupportedModelError: it calls `linear` more often than it did.
        """
        with _Calls([self.get_submodule(name) for name in self.called_layers]):
            return super().forward(*args, **kwargs)


class _Calls(TorchFunctionMode):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._layers = iter(layers)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation_name(func) != _LINEAR:
            return func(*args, **kwargs)
        layer = next(self._layers, None)
        if layer is None:
            raise UnsupportedModelError("a module multiplies by more weights than when it was quantized")
        return layer(args[0] if args else kwargs["input"])


def layer_callers(network: nn.Module, seen: Trace) -> dict[str, tuple[str, ...]]:
    """Modules that may become `LayerCaller`, and the layers that they are to call.

    A module may if it runs once, all calls of `linear` in it are its own, and each of them computes what a layer of the
    module does that never runs, with weight and bias that nothing else uses.
    """
    found = {}
    functions = [one for one in seen.operations if one.name == _LINEAR]
    for name in dict.fromkeys(seen.module_calls[one.owner].name for one in functions if one.owner is not None):
        calls = seen.calls(name)
        inside = [one for one in functions if _runs_in(seen, one, calls[0])]
        layers = [_layer_of(network, seen, name, one) for one in inside if one.owner == calls[0].index]
        if len(calls) == 1 and len(layers) == len(inside) and all(layers):
            found[name] = tuple(layer for layer in layers if layer)
    return found


def call_layers(part: nn.Module, layers: tuple[str, ...]) -> None:
    """Let a module call these layers, in place."""
    part.__class__ = derived_class(LayerCaller, type(part), prefix="Calling")
    cast(LayerCaller, part).called_layers = layers


def _runs_in(seen: Trace, operation: Operation, call: ModuleCall) -> bool:
    return any(one.index == call.index for one in seen.enclosing(operation.call))


def _layer_of(network: nn.Module, seen: Trace, owner: str, operation: Operation) -> str | None:
    """The layer, seen from its owner, that does what a call of `linear` does; none if there is none."""
    for name, part in get_module(network, owner).named_modules():
        full = f"{owner}.{name}".strip(".")
        if not isinstance(part, nn.Linear) or type(part).forward is not nn.Linear.forward or seen.calls(full):
            continue
        own = [seen.parameters[f"{full}.{key}"] for key, value in part._parameters.items() if value is not None]
        alone = all(seen.consumers(value) == (operation,) for value in own)
        if "weight" in part._parameters and operation.inputs[1:] == tuple(own) and alone:
            return str(name)
    return None
