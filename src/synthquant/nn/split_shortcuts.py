"""Layers that read a concatenation of feature maps, as one layer for each of these maps.

Q-Diffusion (arXiv:2302.04304, section 3.3): on the way up, a UNet joins what comes from below with what comes over a
shortcut, `X = [X1; X2]`. The two may differ in range by two orders of magnitude, and so may the weights that read them;
one grid for both then has hardly a code for the smaller one. With `W = [W1; W2]` along the input channels, the layer is
`Y = W1 X1 + W2 X2 + b`, and each of `X1`, `X2`, `W1` and `W2` gets a grid of its own.

No class is named: which layers read a concatenation is seen in a forward pass. The authors split the 1x1 convolutions
that read it as it is (`skip`); with `all`, layers that read it through operations which keep every channel in its place
(normalisations, activations, resampling) are split as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from synthquant.core.modules import get_module, hooked, replace_module
from synthquant.models.operation_names import QUANTIZABLE
from synthquant.models.signature import Inputs
from synthquant.models.trace import Operation, Trace, Value
from synthquant.nn.moves import JOINS, MOVES
from synthquant.nn.placement import Flow

SplitMode = Literal["skip", "all"]

_TOLERANCE = 1e-4
"""Largest difference of outputs, as a share of the largest value, that rounding may make."""
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SAME = frozenset(MOVES["Identity"])
_NORMS = ("group_norm", "layer_norm", "batch_norm", "instance_norm", "rms_norm", "local_response_norm")
_ACTIVATIONS = (
    *("silu", "relu", "relu6", "gelu", "elu", "selu", "celu", "mish", "softplus", "leaky_relu", "prelu", "hardswish"),
    *("hardsigmoid", "hardtanh", "sigmoid", "tanh", "clamp", "clamp_min", "clamp_max", "clip"),
)
_SCALINGS = ("mul", "imul", "rmul", "multiply", "div", "truediv", "itruediv", "add", "iadd", "radd", "sub", "isub")
_POOLINGS = (f"{kind}_pool{n}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for n in (1, 2, 3))
_KEEPING = frozenset((*_SAME, *_NORMS, *_ACTIVATIONS, *_SCALINGS, *_POOLINGS, "interpolate", "pad", "to", "type"))
"""Operations that keep the channels of one tensor in their places; what they scale or shift by is no tensor of its
size."""


class SplitLayer(nn.Module):
    """A convolution or linear layer as one layer for each tensor that was joined to make what it reads.

    Attributes:
        sizes: channels that each of them reads.
        axis: the dimension of the channels.
    """

    def __init__(self, layer: nn.Module, sizes: Sequence[int]) -> None:
        """Divide the layer's weight; the bias goes to the first part.

        Args:
            layer: stays as it is.
            sizes: channels for each part; their sum is what the layer reads.
        """
        super().__init__()
        self.sizes = tuple(sizes)
        self.axis = _channel_axis(layer)
        start = 0
        for number, size in enumerate(sizes):
            self.add_module(_part_name(number), _part(layer, start, size, with_bias=number == 0))
            start += size

    @property
    def parts(self) -> list[nn.Module]:
        """The layers whose outputs are added, in the order of what they read."""
        return [self.get_submodule(_part_name(number)) for number in range(len(self.sizes))]

    @property
    def weight(self) -> Tensor:
        """The whole weight: networks look at its type or its place."""
        axis = _weight_axis(self.parts[0])
        return torch.cat([cast(Tensor, part.weight) for part in self.parts], axis)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer put out, `[B, C_out, ...]` (linear layers `[..., C_out]`), as a sum over the parts.

        Args:
            input: the joined tensor, `[B, C_in, ...]` (linear layers `[..., C_in]`).
            args: what else the layer takes.
            kwargs: the same by name.
        """
        first, *others = torch.split(input, list(self.sizes), self.axis)
        output: Tensor = self.parts[0](first, *args, **kwargs)
        for part, piece in zip(self.parts[1:], others, strict=True):
            output = output + part(piece, *args, **kwargs)
        return output


def split_layers(
    network: nn.Module, seen: Trace, example: Inputs, mode: SplitMode, left: Sequence[str] = ()
) -> dict[str, tuple[str, ...]]:
    """Split the layers of a network that read a concatenation of feature maps, in place.

    A concatenation counts if something in it depends on what a layer put out: sines beside cosines, or a mask beside an
    image, share a range. Grouped layers, layers whose weight is computed, and layers that are no linear function of
    what they read stay whole.

    Args:
        network: the network, in eval mode.
        seen: a forward pass of it.
        example: what it was given there.
        mode: `skip` or `all`, see above.
        left: names of layers that are not split.

    Returns:
        The parts of each layer that was split, by its name.
    """
    found = {name: sizes for name, sizes in joined_inputs(network, seen, mode).items() if name not in left}
    splits = {name: SplitLayer(get_module(network, name), sizes).eval() for name, sizes in found.items()}
    for name in _computing_the_same(network, splits, example):
        replace_module(network, name, splits[name])
    return {
        name: tuple(f"{name}.{_part_name(number)}" for number in range(len(split.sizes)))
        for name, split in splits.items()
        if get_module(network, name) is split
    }


def joined_inputs(network: nn.Module, seen: Trace, mode: SplitMode) -> dict[str, tuple[int, ...]]:
    """The channels of each of the tensors that a layer reads joined, for layers that can be split, by name.

    Args:
        network: the network.
        seen: a forward pass of it.
        mode: `skip` or `all`, see above.
    """
    layers = [name for name in seen.order if isinstance(get_module(network, name), QUANTIZABLE)]
    flow, found = Flow(seen, layers), {}
    for name in layers:
        layer = get_module(network, name)
        if "weight" not in layer._parameters or layer._parameters["weight"] is None or getattr(layer, "groups", 1) != 1:
            continue
        sizes = {_joined(flow, layer, call.inputs[0], mode) for call in seen.calls(name) if call.inputs}
        wanted = next(iter(sizes), None)
        if len(sizes) == 1 and wanted is not None:
            found[name] = wanted
    return found


def _joined(flow: Flow, layer: nn.Module, value: Value, mode: SplitMode) -> tuple[int, ...] | None:
    """Channels of the tensors that were joined to make what a layer reads; none if it reads no concatenation."""
    axis = len(value.shape) + _channel_axis(layer)
    if axis < 0:
        return None
    while (operation := flow.seen.producer(value)) is not None:
        if operation.name in JOINS and len(operation.inputs) > 1:
            made_by_layers = any(flow.is_made_by_layers(part) for part in operation.inputs)
            return _sizes(operation, axis) if made_by_layers else None
        kept = _kept(operation, axis) if operation.name in (_SAME if mode == "skip" else _KEEPING) else None
        if kept is None:
            return None
        value = kept
    return None


def _kept(operation: Operation, axis: int) -> Value | None:
    """The tensor whose channels an operation keeps in their places; none if there is not exactly one."""
    made = operation.outputs[0].shape
    found = [
        value
        for value in dict.fromkeys(operation.inputs)
        if value.from_input and len(value.shape) == len(made) and value.shape[axis] == made[axis]
        and (value.shape == made or operation.name not in _SCALINGS)
    ]  # fmt: skip
    return found[0] if len(found) == 1 else None


def _sizes(join: Operation, axis: int) -> tuple[int, ...] | None:
    """How many channels each joined tensor has; none if they were not joined along the channels."""
    made = join.outputs[0].shape
    shapes = [value.shape for value in join.inputs]
    if any(len(shape) != len(made) for shape in shapes):
        return None
    others = all(shape[:axis] == made[:axis] and shape[axis + 1 :] == made[axis + 1 :] for shape in shapes)
    sizes = tuple(shape[axis] for shape in shapes)
    return sizes if others and sum(sizes) == made[axis] and all(sizes) else None


def _computing_the_same(network: nn.Module, splits: Mapping[str, SplitLayer], example: Inputs) -> list[str]:
    """Names of those split layers that give what the whole ones give in a forward pass."""
    same = dict.fromkeys(splits, True)

    def compare(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            largest = float(output.abs().nan_to_num().amax())
            found = splits[name](*args, **kwargs)
            close = torch.allclose(found, output, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True)
            same[name] = same[name] and close

        return hook

    hooks = [(get_module(network, name), compare(name)) for name in splits]
    with torch.no_grad(), hooked(hooks, with_kwargs=True):
        if splits:
            example.clone().call(network)
    return [name for name, good in same.items() if good]


def _part(layer: nn.Module, start: int, size: int, *, with_bias: bool) -> nn.Module:
    """A copy of a layer that reads `size` of its channels from `start` on."""
    own = {id(parameter): parameter for parameter in layer.parameters()}
    part = copy.deepcopy(layer, dict(own))  # its parameters are not copied whole
    weight = cast(Tensor, layer._parameters["weight"])
    chosen = weight.detach().narrow(_weight_axis(layer), start, size).clone()
    part._parameters["weight"] = nn.Parameter(chosen, requires_grad=weight.requires_grad)
    bias = layer._parameters.get("bias")
    kept = bias is not None and with_bias
    part._parameters["bias"] = _copied(bias) if bias is not None and kept else None
    setattr(part, "in_features" if isinstance(layer, nn.Linear) else "in_channels", size)
    return part


def _copied(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _channel_axis(layer: nn.Module) -> int:
    """The dimension of the channels in what a layer reads, from behind."""
    weight = cast(Tensor, layer._parameters["weight"])
    return 1 - weight.ndim if not isinstance(layer, nn.Linear) else -1


def _weight_axis(layer: nn.Module) -> int:
    """The dimension of the input channels in its weight."""
    return 0 if isinstance(layer, _TRANSPOSED) else 1


def _part_name(number: int) -> str:
    return f"part_{number}"


def whole_names(splits: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The split layer of each part."""
    return {part: name for name, parts in splits.items() for part in parts}


def with_parts(layers: Sequence[str], splits: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Names of layers, those of parts in place of split ones."""
    for name in layers:
        yield from splits.get(name, (name,))
