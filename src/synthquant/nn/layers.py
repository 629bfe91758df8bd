"""Quantized layers: the user's own layer whose `weight` reads as the decoded codes.

A layer is quantized by giving it a class derived from its own, so that every forward of every subclass (timm's
`Conv2dSame`, say) keeps working, attributes that other modules look at stay, and names in the module tree do not
change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.nn.activation_quantizers import ActivationQuantizer, hand_on
from synthquant.nn.derived import derived_class
from synthquant.nn.operations import outside_of_scopes
from synthquant.nn.weight_quantizers import WeightLayout, WeightQuantizer
from synthquant.nn.weight_sources import WeightSource

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Switch(Protocol):
    """What quantizes, or not."""

    enabled: bool


class QuantLayer(nn.Module):
    """What quantization adds to a convolution or linear layer.

    Attributes:
        weight_quantizer: codes and scales, or none for a float weight.
        input_quantizer: quantizer of the tensor read, possibly shared with other layers, or none (float input, or
            quantized where it is made or where the surrounding block takes it in).
        output_quantizer: quantizer of what the layer puts out, or none.
        weights_enabled: use the quantized weight; otherwise the float weight is used.
        weight_source: what computes the quantized weight while it is learned; none: it is decoded from the codes.
        float_bias: the bias before it was corrected, or none if it was not.
    """

    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None
    weights_enabled: bool
    weight_source: WeightSource | None
    float_bias: torch.Tensor | None

    @property
    def float_weight(self) -> torch.Tensor:
        """The weight before quantization.

        Raises:
            ModelError: the network was loaded from a checkpoint, which holds codes only.
        """
        weight = self._parameters["weight"]
        if weight is None:
            raise ModelError("the network was loaded from a checkpoint, which holds no float weights; quantize anew")
        return weight

    @property
    def weight(self) -> torch.Tensor:
        """The weight a forward pass uses."""
        if self.weight_quantizer is None or not self.weights_enabled:
            return self.float_weight
        source = self.weight_quantizer if self.weight_source is None else self.weight_source
        with outside_of_scopes():  # a forward around the layer may look at its weight, for the dtype
            weight: torch.Tensor = source()
        return weight

    def harden_weight(self, *, unclipped: bool = False) -> None:
        """Write what the source has come to into the codes, and read these again.

        Args:
            unclipped: keep codes that lie beyond the grid.
        """
        if self.weight_source is not None and self.weight_quantizer is not None:
            self.weight_quantizer.set_codes(*self.weight_source.decided(), unclipped=unclipped)
        self.weight_source = None

    @property
    def bias(self) -> Any:
        """The bias a forward pass uses, a tensor `[C]` or none: the float layer's own where float weights are used."""
        if not self.has_own_bias:
            return cast(Any, super()).bias
        corrected = self.float_bias is not None
        return self.float_bias if corrected and not self.weights_enabled else self._parameters["bias"]

    @property
    def has_own_bias(self) -> bool:
        """Whether the bias is a parameter of the layer's own, or there is none: it can be corrected."""
        return "bias" in self._parameters

    def correct_bias(self, change: torch.Tensor) -> None:
        """Add `change`, `[C]`, to the bias of the quantized layer; a layer without one gets one."""
        own = self._parameters["bias"]
        self.set_bias((torch.zeros_like(change) if own is None else own.detach()) + change)

    def set_bias(self, bias: torch.Tensor) -> None:
        """Give the quantized layer a bias of its own, `[C]`; the float layer keeps what it had."""
        if self.float_bias is None:
            own = self._parameters["bias"]
            self.float_bias = torch.zeros_like(bias) if own is None else own.detach()
        self._parameters["bias"] = nn.Parameter(bias.clone(), requires_grad=False)

    def make_room_for_bias(self, bias: torch.Tensor) -> None:
        """Let a layer that has no bias take one of this shape from a checkpoint: bias correction gave it one."""
        if self.has_own_bias and self._parameters["bias"] is None:
            self._parameters["bias"] = nn.Parameter(torch.zeros_like(bias), requires_grad=False)

    def make_room(self, state: Mapping[str, torch.Tensor], name: str) -> None:
        """Let the layer called `name` take what is in a `state_dict` of a network like its own."""
        if f"{name}.bias" in state:
            self.make_room_for_bias(state[f"{name}.bias"])
        codes = state.get(f"{name}.weight_quantizer.codes")
        if self.weight_quantizer is None or codes is None:  # only a part of a state, or a layer with a float weight
            return
        self.weight_quantizer.make_room_for(codes)
        weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.float_bias")
        if weight is None:
            self.drop_float_weight()
        elif self.without_float_weight:
            empty = torch.zeros_like(weight, device=self.weight_quantizer.codes.device)
            self._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        self.float_bias = None if bias is None else torch.zeros_like(bias, device=self.weight_quantizer.codes.device)

    @property
    def without_float_weight(self) -> bool:
        """Whether the weight is codes alone."""
        return self.weight_quantizer is not None and self._parameters["weight"] is None

    def drop_float_weight(self) -> None:
        """Forget the float weight, and the float bias, of a quantized layer."""
        self.float_bias = None
        if self.weight_quantizer is not None:
            self._parameters["weight"] = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer; what it and its hooks compute is not an operation of the module around it."""
        with outside_of_scopes():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize the input, then the layer's own forward, then quantize the output."""
        if self.input_quantizer is not None:
            args, kwargs = first_replaced(self.input_quantizer, args, kwargs)
        output = super().forward(*args, **kwargs)
        return output if self.output_quantizer is None else hand_on(self.output_quantizer, output)


def quantize_layer(
    layer: nn.Module,
    weight_quantizer: WeightQuantizer | None,
    input_quantizer: ActivationQuantizer | None,
    output_quantizer: ActivationQuantizer | None = None,
    kind: type[QuantLayer] = QuantLayer,
) -> QuantLayer:
    """Turn a convolution or linear layer into its quantized self, in place; `kind` is what is added to its class."""
    layer.__class__ = derived_class(kind, type(layer))
    quantized = cast(QuantLayer, layer)
    quantized.weight_quantizer = weight_quantizer
    quantized.input_quantizer = input_quantizer
    quantized.output_quantizer = output_quantizer
    quantized.weights_enabled = True
    quantized.weight_source = None
    quantized.register_buffer("float_bias", None)
    return quantized


def weight_layout(layer: nn.Module) -> WeightLayout:
    """How the layer's weight is arranged.

    Raises:
        UnsupportedModelError: its weight is not a parameter of its own.
    """
    weight = layer._parameters.get("weight")
    if weight is None:
        raise UnsupportedModelError(
            f"a {type(layer).__name__} computes its weight from other parameters (weight norm or the like); make that"
            " weight an ordinary parameter first, for example with torch.nn.utils.remove_weight_norm or"
            " torch.nn.utils.parametrize.remove_parametrizations"
        )
    groups = layer.groups if isinstance(layer, TRANSPOSED) else 0
    return WeightLayout(tuple(weight.shape), groups)


@contextmanager
def switched(
    layers: Iterable[QuantLayer], quantizers: Iterable[Switch], *, weights: bool, activations: bool
) -> Iterator[None]:
    """Let layers use quantized weights, or not, and quantizers quantize, or not, for a while."""
    former_layers = [(layer, layer.weights_enabled) for layer in layers]
    former_quantizers = [(quantizer, quantizer.enabled) for quantizer in quantizers]
    try:
        for layer, _ in former_layers:
            layer.weights_enabled = weights
        for quantizer, _ in former_quantizers:
            quantizer.enabled = activations
        yield
    finally:
        for layer, enabled in former_layers:
            layer.weights_enabled = enabled
        for quantizer, enabled in former_quantizers:
            quantizer.enabled = enabled


class QuantBlock(nn.Module):
    """A block whose first argument is quantized once for all its readers, its identity shortcut among them."""

    input_quantizer: ActivationQuantizer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize the input, then the block's own forward."""
        args, kwargs = first_replaced(self.input_quantizer, args, kwargs)
        return super().forward(*args, **kwargs)


def quantize_block(block: nn.Module, input_quantizer: ActivationQuantizer) -> QuantBlock:
    """Let a block quantize its first argument, in place."""
    block.__class__ = derived_class(QuantBlock, type(block))
    quantized = cast(QuantBlock, block)
    quantized.input_quantizer = input_quantizer
    return quantized


def first_replaced(
    change: Callable[[torch.Tensor], torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with what `change` makes of the first tensor among them, positional ones first."""
    if args and isinstance(args[0], torch.Tensor):
        return (change(args[0]), *args[1:]), kwargs
    leaves, spec = pytree.tree_flatten((args, kwargs))
    first = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    leaves[first] = change(leaves[first])
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs
