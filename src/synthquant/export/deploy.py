"""A private copy of a quantized network that computes with integer weights, as a runtime will.

Every affine activation quantizer and every quantized layer of the copy gets a class that calls `QuantizeLinear` and
`DequantizeLinear` of an `Operators` object: plain tensor arithmetic, which runs and which `torch.export` takes, or ONNX
operators while a graph is exported. Quantizers of other kinds stay tensor arithmetic. The modules stay where they are,
so every network that runs can be deployed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from synthquant.core.errors import SchemeError
from synthquant.export.grids import (
    ActivationGrid,
    WeightGrid,
    activation_grid,
    require_fit,
    require_weights_fit,
    weight_grid,
)
from synthquant.export.presets import Preset
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.derived import derived_class
from synthquant.nn.layers import QuantLayer
from synthquant.nn.operations import outside_of_scopes
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.weight_quantizers import WeightLayout

# Where the exporter notes on a DequantizeLinear which layer's weight it decodes, and how it is packed.
LAYER_KEY = "synthquant.layer"
PACKED_KEY = "synthquant.packed_bits"

OPSET = 21
"""ONNX operator set: the first one with 4-bit and 16-bit types and blocks in DequantizeLinear."""


class Operators(Protocol):
    """The three operations that quantization adds to a network."""

    def clip(self, x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
        """`x` limited to what the grid covers."""
        ...

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes of `x`, in the type of the zero point."""
        ...

    def dequantize(self, codes: Tensor, grid: ActivationGrid | WeightGrid, layer: str) -> Tensor:
        """What the codes stand for, float32; `layer` names a weight's layer and is empty for activations."""
        ...


class Arithmetic:
    """The operations as tensor arithmetic, bit for bit what fake quantization computes."""

    def clip(self, x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
        """`x` limited to what the grid covers."""
        return torch.clamp(x, low, high)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes of `x` as whole float numbers: torch computes little in small integer types."""
        limits = torch.iinfo(zero_point.dtype)
        return torch.clamp(torch.round(x / scale) + zero_point.float(), limits.min, limits.max)

    def dequantize(self, codes: Tensor, grid: ActivationGrid | WeightGrid, layer: str) -> Tensor:
        """What the codes stand for, float32."""
        scale, zero_point = grid.scale, grid.zero_point.float()
        if isinstance(grid, WeightGrid) and grid.axis is not None:
            if grid.block is not None:
                scale = scale.repeat_interleave(grid.block, grid.axis)
                zero_point = zero_point.repeat_interleave(grid.block, grid.axis)
            else:
                shape = [1] * codes.ndim
                shape[grid.axis] = -1
                scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        return (codes.float() - zero_point) * scale


class Symbols:
    """The operations as ONNX operators; they can be exported, not run."""

    def clip(self, x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
        """`Clip`."""
        return _symbolic("Clip", (x, low, high), x.dtype, x.shape)

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`QuantizeLinear`."""
        return _symbolic("QuantizeLinear", (x, scale, zero_point), zero_point.dtype, x.shape)

    def dequantize(self, codes: Tensor, grid: ActivationGrid | WeightGrid, layer: str) -> Tensor:
        """`DequantizeLinear`, with the layer's name on the node of a weight."""
        attributes: dict[str, int] = {}
        notes = {LAYER_KEY: layer} if layer else {}
        if isinstance(grid, WeightGrid):
            attributes |= {} if grid.axis is None else {"axis": grid.axis}
            attributes |= {} if grid.block is None else {"block_size": grid.block}
            notes |= {} if grid.packed_bits is None else {PACKED_KEY: str(grid.packed_bits)}
        inputs = (codes, grid.scale, grid.zero_point)
        return _symbolic("DequantizeLinear", inputs, torch.float32, codes.shape, attributes, notes)


def _symbolic(
    name: str,
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    attributes: dict[str, int] | None = None,
    notes: dict[str, str] | None = None,
) -> Tensor:
    return torch.onnx.ops.symbolic(
        name, inputs, dict(attributes or {}), dtype=dtype, shape=shape, version=OPSET, metadata_props=notes or None
    )


class DeployQuantizer(nn.Module):
    """What deployment makes of an activation quantizer: it goes through integer codes."""

    operators: Operators
    deploy_scale: Tensor
    deploy_zero_point: Tensor
    deploy_low: Tensor | None
    deploy_high: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Quantize and dequantize."""
        grid = ActivationGrid(self.deploy_scale, self.deploy_zero_point, self.deploy_low, self.deploy_high)
        if grid.low is not None or grid.high is not None:
            x = self.operators.clip(x, grid.low, grid.high)
        codes = self.operators.quantize(x, grid.scale, grid.zero_point)
        return self.operators.dequantize(codes, grid, "")


class DeployLayer(nn.Module):
    """What deployment adds to a quantized layer: its weight is decoded from integers."""

    operators: Operators
    deploy_name: str
    deploy_codes: Tensor
    deploy_scale: Tensor
    deploy_zero_point: Tensor
    deploy_form: WeightGrid
    deploy_layout: WeightLayout | None

    @property
    def weight(self) -> Tensor:
        """The decoded weight, in the layer's own shape."""
        decoded = self.decoded()
        with outside_of_scopes():
            return decoded if self.deploy_layout is None else self.deploy_layout.weight(decoded)

    def decoded(self) -> Tensor:
        """The decoded weight as it is stored; decoding it is no operation of the module that looks at it."""
        form = self.deploy_form
        # The buffers, not the tensors of `form`: the exporter finds initialisers among parameters and buffers only.
        grid = WeightGrid(
            self.deploy_codes, self.deploy_scale, self.deploy_zero_point, form.axis, form.block, form.packed_bits
        )
        with outside_of_scopes():
            return self.operators.dequantize(grid.codes, grid, self.deploy_name)


class DeployLinear(DeployLayer):
    """A plain linear layer as a product with a stored `[in, out]` matrix, the form that runtimes fuse."""

    bias: Tensor | None
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None

    @property
    def weight(self) -> Tensor:
        """The decoded weight, `[out, in]`."""
        with outside_of_scopes():
            return self.decoded().t()

    def forward(self, x: Tensor) -> Tensor:
        """`x @ W + b` for `x` of any number of dimensions."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        # As a matrix, because ONNX Runtime adds the bias of a matrix product inside the integer kernel.
        result = x.reshape(-1, x.shape[-1]) @ self.decoded()
        if self.bias is not None:
            result = result + self.bias
        if self.output_quantizer is not None:
            result = self.output_quantizer(result)
        return result if x.ndim == 2 else result.reshape(-1, *x.shape[1:-1], result.shape[-1])


def deploy(quant_model: QuantModel, preset: Preset, operators: Operators) -> QuantModel:
    """Return a copy of `quant_model` on the CPU that computes with integer codes in the forms of `preset`.

    The original is left as it was; both share the float model.

    Raises:
        ModelError: activation ranges are not calibrated.
        SchemeError: the network is modulated, or the preset cannot express a grid; names it.
    """
    require_stateless(quant_model)
    quant_model.require_calibrated()
    packed = packed_layers(quant_model, preset)
    copied = copy.deepcopy(quant_model, {id(quant_model.float_model): quant_model.float_model}).cpu().eval()
    for name, quantizer in copied.quantizers.items():
        quantizer.cpu()  # those of operations are in no module's list of children
        grid = activation_grid(quantizer, name, preset)
        if grid is not None:
            _deploy_quantizer(quantizer, grid, operators)
    for name, layer in copied.layers.items():
        if layer.weight_quantizer is not None:
            weight = weight_grid(layer.weight_quantizer, name, preset, packed=name in packed)
            _deploy_layer(layer, weight, name, operators)
    return copied


def require_stateless(quant_model: QuantModel) -> None:
    """Raise `SchemeError` if the network keeps tensors from one call to the next, which no exported graph does."""
    if quant_model.modulation is not None:
        raise SchemeError(
            f"{quant_model.float_model.name}: modulation keeps tensors between the steps of a sampler, and no exported"
            " graph does; keep the checkpoint and sample with that, or leave scheme.modulation out"
        )


def require_takes(quant_model: QuantModel, preset: Preset) -> None:
    """Raise `SchemeError` unless the preset can express the scheme, whatever ranges turn out to be."""
    require_stateless(quant_model)
    packed = packed_layers(quant_model, preset)
    for name, quantizer in quant_model.quantizers.items():
        if quantizer.fixed:
            activation_grid(quantizer, name, preset)
        else:
            require_fit(quantizer.args, name, preset)
    for name, layer in quant_model.layers.items():
        if layer.weight_quantizer is not None:
            require_weights_fit(layer.weight_quantizer.args, name, preset, packed=name in packed)


def packed_layers(quant_model: QuantModel, preset: Preset) -> frozenset[str]:
    """Names of the layers whose weights the preset packs: linear ones of at most so many bits that read a float tensor.

    Raises:
        SchemeError: the preset packs weights and there is no such layer, or one has a quantized input.
    """
    if preset.packed_bits is None:
        return frozenset()
    found = set()
    for name, layer in quant_model.layers.items():
        quantizer = layer.weight_quantizer
        if quantizer is None or quantizer.num_bits > preset.packed_bits or not isinstance(layer, nn.Linear):
            continue
        if quant_model.input_bits(name) is not None:
            raise SchemeError(
                f"preset {preset.name} cannot express {name}: a product of {quantizer.num_bits}-bit weights with"
                f" {quant_model.input_bits(name)}-bit activations runs in float; leave its input in float with"
                f" scheme.overrides={{{name}: {{input_activations: null}}}}, or use preset simulate"
            )
        found.add(name)
    if not found:
        raise SchemeError(
            f"preset {preset.name} packs weights of {preset.packed_bits} bits in linear layers that read a float"
            " tensor, and the scheme has none; use preset ort-cpu"
        )
    return frozenset(found)


def _deploy_quantizer(quantizer: ActivationQuantizer, grid: ActivationGrid, operators: Operators) -> None:
    kind = derived_class(DeployQuantizer, type(quantizer), prefix="Deploy")
    quantizer.__class__ = cast(type[ActivationQuantizer], kind)
    deployed = cast(DeployQuantizer, quantizer)
    deployed.operators = operators
    deployed.register_buffer("deploy_scale", grid.scale)
    deployed.register_buffer("deploy_zero_point", grid.zero_point)
    deployed.register_buffer("deploy_low", grid.low)
    deployed.register_buffer("deploy_high", grid.high)


def _deploy_layer(layer: QuantLayer, grid: WeightGrid, name: str, operators: Operators) -> None:
    """Give the layer its integer weight and take the codes and float weights of training away."""
    kind: type[nn.Module] = DeployLayer
    layout = cast(Any, layer.weight_quantizer).layout
    if _is_plain_linear(layer):
        kind, grid = DeployLinear, grid.transposed()
    layer.__class__ = type(f"Deploy{type(layer).__name__}", (kind, type(layer)), {"__module__": __name__})
    deployed = cast(DeployLayer, layer)
    layer.weight_quantizer = None
    layer._parameters["weight"] = None
    deployed.operators = operators
    deployed.deploy_name = name
    deployed.deploy_form = grid
    deployed.deploy_layout = None if grid.codes.shape == layout.shape else layout
    deployed.register_buffer("deploy_codes", grid.codes)
    deployed.register_buffer("deploy_scale", grid.scale)
    deployed.register_buffer("deploy_zero_point", grid.zero_point)


def _is_plain_linear(layer: QuantLayer) -> bool:
    """Whether the layer's own forward, behind quantization's, is that of `nn.Linear`, and nothing is put before it."""
    if type(layer).forward is not QuantLayer.forward:
        return False
    return isinstance(layer, nn.Linear) and cast(Any, super(QuantLayer, layer)).forward.__func__ is nn.Linear.forward
