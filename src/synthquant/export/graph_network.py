"""The network of modules that a program of `torch.export` is read back as; imported where one is read.

What `torch.export` writes has operations of ATen where there were layers. Here they become layers again: the tree of
modules is as it was, a module that only convolved or normalised with its own weights is that layer, and every other
operation is the function of torch that it was recorded from. Such a network is quantized like the one it was made from.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.export.unflatten import InterpreterModule, InterpreterModuleDispatcher

from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.export.float_graph import CONSTANTS_FILE, CONTAINERS, CONTAINERS_FILE, GRAPH_NAME, TRACING_ERRORS
from synthquant.models.signature import Inputs

_CONVOLUTIONS: dict[str, type[nn.Module]] = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_TRANSPOSED: dict[str, type[nn.Module]] = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of an assertion about a tensor that was traced."""


# Operations under another name than the function of torch that does the same.
_RENAMED: dict[str, Callable[..., Any]] = {
    "sym_size": torch.Tensor.size,
    "lift_fresh_copy": torch.clone,
    "_assert_tensor_metadata": _nothing,
}


def network_of_graph(content: bytes) -> tuple[nn.Module, Inputs]:
    """Return the network that `float_graph` wrote, in modules, and an example of its inputs.

    Reading such a program evaluates expressions in it: it must come from somebody who is trusted.

    Raises:
        ModelError: it cannot be read.
        UnsupportedModelError: an operation in it is no function of torch.
    """
    extra: dict[str, Any] = {CONTAINERS_FILE: "", CONSTANTS_FILE: ""}
    try:
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
        network = torch.export.unflatten(program)
        containers = json.loads(extra[CONTAINERS_FILE])
        constants = frozenset(json.loads(extra[CONSTANTS_FILE]))
    except TRACING_ERRORS as error:
        raise ModelError(f"{GRAPH_NAME} cannot be read: {error}") from error
    for name, part in list(network.named_modules())[::-1]:  # the innermost first
        if name:
            parent, _, key = name.rpartition(".")
            network.get_submodule(parent)._modules[key] = _as_it_was(part, containers.get(name))
    for graph_module in _graph_modules(network):
        _use_torch_functions(graph_module)
    args, kwargs = cast(tuple[tuple[Any, ...], dict[str, Any]], program.example_inputs)
    return network.eval().requires_grad_(False), Inputs(args, kwargs, constants)


def _as_it_was(part: nn.Module, container: str | None) -> nn.Module:
    """The module that a part of the graph was recorded from, as far as it can be told."""
    if container is not None and _takes_one(part):
        held = CONTAINERS[container]()
        held._modules.update(part._modules)
        return held
    if not isinstance(part, InterpreterModule):
        return part
    return _layer(part) or _of_its_class(part)


def _takes_one(part: nn.Module) -> bool:
    """Whether a module takes one tensor, or is never called: others get sizes that were computed outside, too."""
    return not isinstance(part, InterpreterModule) or len(_placeholders(part)) == 1


def _placeholders(part: InterpreterModule) -> list[fx.Node]:
    return [node for node in part.graph.nodes if node.op == "placeholder"]


def _of_its_class(part: InterpreterModule) -> nn.Module:
    """The same module with a class of its own for each class that there was: units are found by classes."""
    part.__class__ = _class_named(str(part._ty))
    return part


@cache
def _class_named(name: str) -> type[InterpreterModule]:
    return type(name.rpartition(".")[2], (InterpreterModule,), {"__module__": __name__})


def _layer(part: InterpreterModule) -> nn.Module | None:
    """The layer that computes what this module does, if it does one thing with its own weights."""
    calls = [node for node in part.graph.nodes if node.op in ("call_function", "call_module", "call_method")]
    if len(calls) != 1 or not isinstance(calls[0].target, OpOverload) or list(part.children()):
        return None
    values = _arguments(calls[0])
    found = _made(_name(calls[0].target), values, part)
    if found is None:
        return None
    found.load_state_dict(part.state_dict(), strict=False, assign=True)
    return found


def _made(name: str, values: dict[str, Any], part: InterpreterModule) -> nn.Module | None:
    bias = values.get("bias") is not None
    weight = cast(Any, getattr(part, "weight", None))
    if name in _CONVOLUTIONS or name in _TRANSPOSED:
        dims = weight.ndim - 2

        def sides(key: str) -> Any:
            value = values[key]
            return value if isinstance(value, str) else tuple(value) * (dims if len(value) == 1 else 1)

        geometry = {key: sides(key) for key in ("stride", "padding", "dilation")}
        groups = values["groups"]
        if name in _CONVOLUTIONS:
            made: Callable[..., nn.Module] = _CONVOLUTIONS[name]
            channels = (weight.shape[1] * groups, weight.shape[0])
        else:
            made = _TRANSPOSED[name]
            channels = (weight.shape[0], weight.shape[1] * groups)
            geometry["output_padding"] = sides("output_padding")
        return made(*channels, tuple(weight.shape[2:]), groups=groups, bias=bias, device="meta", **geometry)
    if name == "linear":
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta")
    if name == "batch_norm" and not values["training"]:
        made = _BATCH_NORMS[_dims_of_input(part)]
        affine = values["weight"] is not None
        return made(len(cast(Any, part.running_mean)), values["eps"], values["momentum"], affine, device="meta")
    if name == "layer_norm":
        affine = values["weight"] is not None
        return nn.LayerNorm(tuple(values["normalized_shape"]), values["eps"], affine, bias, device="meta")
    if name == "group_norm" and values["weight"] is not None:
        return nn.GroupNorm(values["num_groups"], len(weight), values["eps"], device="meta")
    return None


def _dims_of_input(part: InterpreterModule) -> int:
    """Number of dimensions of the tensor that a module takes."""
    return cast(int, _placeholders(part)[0].meta["val"].ndim)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an operation by name, defaults included."""
    schema = cast(OpOverload, node.target)._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)
    defaults = {one.name: one.default_value for one in schema if one.has_default_value()}
    return defaults | given


def _graph_modules(network: nn.Module) -> Iterator[Any]:
    """All that has a graph; a module that was called several times has one for each call."""
    for part in network.modules():
        if isinstance(part, InterpreterModuleDispatcher):
            yield from cast(Any, part).call_modules()
        elif hasattr(part, "graph"):
            yield part


def _use_torch_functions(part: Any) -> None:
    """Call functions of torch where operations of ATen stand, and forget what was noted while tracing."""
    for node in part.graph.nodes:
        node.meta = {}  # tensors without values, which cannot be copied
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            node.target, node.args, node.kwargs = _torch_function(node)
    if isinstance(part, InterpreterModule):
        cast(Any, part).finalize()


def _torch_function(node: fx.Node) -> tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]:
    """The function that torch has for an operation, which takes the same arguments."""
    name = _name(cast(OpOverload, node.target))
    if name == "slice":
        return _sliced(node)
    known = [_RENAMED.get(name), *(getattr(place, name, None) for place in (torch, torch._C._nn, torch.Tensor))]
    for found in known:
        if callable(found):
            return found, node.args, dict(node.kwargs)
    raise UnsupportedModelError(f"operation {node.target} of its graph is no function of torch")


def _sliced(node: fx.Node) -> tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]:
    values = _arguments(node)
    index = (slice(None),) * values["dim"] + (slice(values["start"], values["end"], values["step"]),)
    return torch.Tensor.__getitem__, (values["self"], index), {}


def _name(operation: OpOverload) -> str:
    return str(operation._schema.name.partition("::")[2])
