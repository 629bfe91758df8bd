"""Which linear layers read what a layer norm puts out, and nothing else does.

Layer norms are found as calls of `layer_norm`, whatever calls it; their tensors are followed through one forward pass.
Another pass, in which every layer norm puts out the numbers of its channels, tells whether a layer reads the channels
in their order, and no padding between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import eval_mode, get_module, hooked
from synthquant.models.batch_norm import is_plain
from synthquant.models.operation_names import QUANTIZABLE, operation_name
from synthquant.models.signature import Inputs
from synthquant.models.trace import ModuleCall, Operation, Trace, Value, trace
from synthquant.nn.moves import is_move

_LAYER_NORM = "layer_norm"
# They look at the form of a tensor and not at its values.
_OF_FORM = frozenset(("new_zeros", "new_ones", "new_empty", "zeros_like", "ones_like", "empty_like"))


@dataclass(frozen=True)
class LayersBehindNorm:
    """The layers behind one layer norm.

    Attributes:
        norm: the name of its module, or of its weight if that is called otherwise than `weight`.
        weight: name of its parameter `[C]`.
        bias: name of its parameter `[C]`, which need not be there yet.
        layers: linear layers that read its channels in their order, which nothing else reads.
    """

    norm: str
    weight: str
    bias: str
    layers: tuple[str, ...]


class _Unfit(Exception):
    """Says why the channels of a layer norm cannot be changed together with what reads them."""


def layers_behind_norms(module: nn.Module, example: Inputs) -> tuple[list[LayersBehindNorm], dict[str, str]]:
    """Follow what the layer norms of a network put out.

    Args:
        module: the float network, in eval mode; it is as before afterwards.
        example: some samples.

    Returns:
        The layer norms that only linear layers read; and, by name, why others are not among them.

    Raises:
        UnsupportedModelError: which of them run depends on the values in the network.
    """
    seen = trace(module, example)
    numbered = _Numbered()
    read: dict[str, list[Tensor]] = {}
    found, left = [], {}

    def keep(layer: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        read.setdefault(name, []).extend(args[:1])

    linear = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    hooks = [(part, partial(keep, name=name)) for name, part in linear.items()]
    with torch.no_grad(), eval_mode(module), hooked(pre=hooks), numbered:
        example.clone().call(module)
    operations = [one for one in seen.operations if one.name == _LAYER_NORM]
    if len(operations) != len(numbered.parameters):
        raise UnsupportedModelError("the layer norms that run depend on what they read, so they cannot be changed")
    for operation, parameters in zip(operations, numbered.parameters, strict=True):
        names = _names(module, parameters)
        call = seen.module_calls[operation.call]
        norm = (names[0] or "").removesuffix(".weight") or call.name or operation.key
        try:
            weight, bias = _own(seen, module, operation, names)
            layers = _readers(seen, module, operation.outputs[0])
            for layer in layers:
                if not all(_in_order(tensor) for tensor in read.get(layer, [torch.empty(0)])):
                    raise _Unfit(f"{layer} does not read its channels in their order alone")
            found.append(LayersBehindNorm(norm, weight, bias, layers))
        except _Unfit as error:
            left[norm] = str(error)
    return found, left


class _Numbered(TorchFunctionMode):
    """Lets every layer norm put out the numbers of its channels.

    Attributes:
        parameters: weight and bias of each call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters: list[tuple[Tensor | None, Tensor | None]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if operation_name(func) != _LAYER_NORM:
            return result
        given = {**dict(zip(("input", "normalized_shape", "weight", "bias"), args, strict=False)), **(kwargs or {})}
        self.parameters.append((given.get("weight"), given.get("bias")))
        numbers = torch.arange(result.shape[-1], dtype=result.dtype, device=result.device)
        return numbers.expand_as(result).contiguous()


def _in_order(tensor: Tensor) -> bool:
    """Whether the last dimension of what a layer reads holds the numbers of the channels."""
    numbers = torch.arange(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    return tensor.numel() > 0 and bool((tensor == numbers).all())


def _names(module: nn.Module, parameters: Sequence[Tensor | None]) -> list[str | None]:
    known = {id(value): name for name, value in reversed(list(module.named_parameters(remove_duplicate=False)))}
    return [known.get(id(parameter)) for parameter in parameters]


def _own(seen: Trace, module: nn.Module, operation: Operation, names: Sequence[str | None]) -> tuple[str, str]:
    """Names of weight and bias, if they are this operation's alone."""
    weight, bias = names
    if weight is None or module.get_parameter(weight).ndim != 1:
        raise _Unfit("it has no weight for each channel")
    if bias is None:  # a module that may have one gets one
        owner, _, name = weight.rpartition(".")
        own = get_module(module, owner)._parameters
        if name != "weight" or "bias" not in own or own["bias"] is not None:
            raise _Unfit("it has no bias, and no place for one")
        bias = f"{owner}.bias".lstrip(".")
    elif module.get_parameter(bias).ndim != 1:
        raise _Unfit("it has no bias for each channel")
    for name in filter(None, names):
        if seen.consumers(seen.parameters[name]) != (operation,):
            raise _Unfit("it runs several times, or something else computes with its parameters")
    return weight, bias


def _readers(seen: Trace, module: nn.Module, value: Value) -> tuple[str, ...]:
    """The linear layers that read a value, each once."""
    values = [value]
    known: dict[str, None] = {}
    returned = seen.module_calls[0].outputs
    while values:
        value = values.pop()
        if value in returned:
            raise _Unfit("the network puts it out")
        for operation in seen.consumers(value):
            if operation.name in _OF_FORM:
                continue
            layer = _layer(seen, module, operation)
            if layer is None and is_move(operation):
                values += operation.outputs
            elif layer is None:
                raise _Unfit(f"{_place(seen, operation)} reads it too")
            else:
                _require_plain(seen, module, layer, operation, value)
                known[layer.name] = None
    if not known:
        raise _Unfit("nothing reads it")
    return tuple(known)


def _layer(seen: Trace, module: nn.Module, operation: Operation) -> ModuleCall | None:
    calls = seen.enclosing(operation.call)
    return next((call for call in calls if isinstance(get_module(module, call.name), QUANTIZABLE)), None)


def _require_plain(seen: Trace, module: nn.Module, call: ModuleCall, operation: Operation, value: Value) -> None:
    layer = get_module(module, call.name)
    if not isinstance(layer, nn.Linear):
        raise _Unfit(f"{call.name} reads it, which is no linear layer")
    if call.inputs[:1] != (value,) or not is_plain(seen, call.name, layer, operation):
        raise _Unfit(f"{call.name} reads it, which runs several times or does more than multiply by its own weight")


def _place(seen: Trace, operation: Operation) -> str:
    owner = "" if operation.owner is None else seen.module_calls[operation.owner].name
    return f"{owner}.{operation.key}".lstrip(".")
