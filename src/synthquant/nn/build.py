"""From a float model and a scheme to the parts of a quantized network: what `QuantModel.build` does."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from synthquant.core.errors import ModelError, SchemeError, UnsupportedModelError
from synthquant.core.modules import get_module, hooked
from synthquant.models.batch_norm import fold_batch_norms
from synthquant.models.blocks import Granularity, Unit, block_inputs, find_units, shared_inputs
from synthquant.models.float_model import FloatModel
from synthquant.models.operation_names import QUANTIZABLE
from synthquant.models.products import Product, find_products
from synthquant.models.signature import Inputs
from synthquant.models.trace import Trace, trace
from synthquant.nn.activation_quantizers import ActivationQuantizer, new_quantizer
from synthquant.nn.equalization import Equalization
from synthquant.nn.layers import QuantLayer, quantize_block, quantize_layer, switched, weight_layout
from synthquant.nn.modulation import ModulatedLayer, Modulation, modulate, modulated_plan, require_linear
from synthquant.nn.operations import watch_operations
from synthquant.nn.own_forward import copy_network
from synthquant.nn.placement import Flow, OperationRow, Placement
from synthquant.nn.placement_check import check_placement
from synthquant.nn.placement_outputs import output_quantizers
from synthquant.nn.placement_reads import ReadPlacement, readable
from synthquant.nn.rewrites import make_visible
from synthquant.nn.rotation import channel_dim, rotated_layer, rotated_plan
from synthquant.nn.sampler_run import SamplerRun
from synthquant.nn.scheme import AttentionScheme, LayerScheme, QuantArgs, QuantScheme
from synthquant.nn.split_shortcuts import split_layers, whole_names, with_parts
from synthquant.nn.visible import ATTENTION, KERNELS
from synthquant.nn.weight_quantizers import WeightQuantizer

# Synthetic images are classified with less confidence than real ones: on zoo/cifar10-resnet20 the largest logit of 256
# of them was 0.2 (zeroq), 0.4 (noise) and 0.9 (genie_d) of that of 256 training images. A wider grid costs a bit, one
# that is too narrow makes ties.
_LOGITS_HEADROOM = 2.0


@dataclass
class Parts:
    """What a quantized network consists of.

    Attributes:
        module: the network, quantizers in place.
        scheme: what was asked for, without `attention` where the network has none.
        folded: pairs (batch norm, layer it was folded into).
        fold: batch norms were folded where that is possible.
        layers: quantized layers by name, in execution order.
        quantizers: activation quantizers by name, each once.
        reads: for each layer whose input is quantized, the name of the quantizer of that tensor.
        operations: what becomes of the operations outside layers, in execution order.
        operation_quantizers: the quantizers of these; they are no children of the modules they stand in.
        output_quantizers: names of those of tensors that leave the network (`deploy: full`).
        products: all matrix products of a forward pass.
        units: reconstruction units by granularity, of layers quantized or not.
        splits: the parts of each layer that was split (`scheme.split_shortcuts`), by its name.
        softmaxes: names of the quantizers of what a softmax puts out.
        modulation: the layers that read differences between the steps of a sampler, or none.
    """

    module: nn.Module
    scheme: QuantScheme
    folded: list[tuple[str, str]]
    fold: bool = True
    layers: dict[str, QuantLayer] = field(default_factory=dict)
    quantizers: dict[str, ActivationQuantizer] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    operations: list[OperationRow] = field(default_factory=list)
    operation_quantizers: list[ActivationQuantizer] = field(default_factory=list)
    output_quantizers: list[str] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    units: dict[Granularity, list[Unit]] = field(default_factory=dict)
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    softmaxes: list[str] = field(default_factory=list)
    modulation: Modulation | None = None


def build_parts(
    float_model: FloatModel, scheme: QuantScheme, equalization: Equalization | None = None, *, fold: bool = True
) -> Parts:
    """Copy `float_model`, fold its batch norms and put in quantizers by `scheme`; ranges are not calibrated yet.

    Layers are turned into quantized ones where they stand in the module tree, and quantizers are shared where several
    layers read the same tensor. Nothing is traced symbolically; one forward pass of a small example tells which tensor
    flows where.

    Raises:
        SchemeError: the scheme quantizes nothing, a pattern matches nothing, or there is no softmax where it names one.
        ModelError: the equalisation is one of another network, or batch norms are not to be folded with it.
    """
    if equalization is not None and not fold:
        raise ModelError(f"{float_model.name}: channels are equalised in a network whose batch norms are folded")
    module, folded = folded_copy(float_model, fold=fold)
    example = float_model.example(2)
    if equalization is not None:
        equalization.apply(module)
    with torch.no_grad():
        seen = trace(module, example)
    order = _layers(module, seen)
    if not order:
        raise SchemeError(f"{float_model.name}: no convolution or linear layer to quantize")
    scheme = _settled(scheme, Flow(seen, order), float_model.name)
    parts = Parts(module, scheme, folded, fold)
    for granularity in ("block", "layer", "network"):
        parts.units[granularity] = find_units(parts.module, example, granularity, set(order), seen)
    if scheme.split_shortcuts is not None:
        seen = _split(parts, seen, order, example)
        order = _layers(module, seen)
    of_inputs = _Insertion(float_model, parts).run(seen, order, example)
    if not parts.layers:
        raise SchemeError(f"{float_model.name}: the scheme leaves all {len(order)} layers in floating point")
    _count(float_model, parts, example)
    if float_model.input_limits is not None:  # calibration images may not reach black or white
        for quantizer in of_inputs:
            quantizer.fix(*float_model.input_limits)
    return parts


def _layers(module: nn.Module, seen: Trace) -> list[str]:
    """Names of the layers that ran, in execution order."""
    return [name for name in seen.order if isinstance(get_module(module, name), QUANTIZABLE)]


def _image_readers(seen: Trace, order: Sequence[str]) -> list[str]:
    """Layers that read the network's first input as it is."""
    return [name for name in order if set(seen.calls(name)[0].inputs[:1]) & set(seen.inputs[:1])]


def _split(parts: Parts, seen: Trace, order: Sequence[str], example: Inputs) -> Trace:
    """Split layers, in place, and return another forward pass; units have the parts in place of these layers."""
    scheme = parts.scheme
    if scheme.split_shortcuts is None:
        return seen
    left = [name for name in order if scheme.ignores(name)]
    parts.splits = split_layers(parts.module, seen, example, scheme.split_shortcuts, left)
    for granularity, units in parts.units.items():
        named = [Unit(unit.name, tuple(with_parts(unit.layers, parts.splits))) for unit in units]
        parts.units[granularity] = named
    with torch.no_grad():
        return trace(parts.module, example)


def folded_copy(float_model: FloatModel, *, fold: bool = True) -> tuple[nn.Module, list[tuple[str, str]]]:
    """A copy of the network without gradients, every product visible and batch norms folded if `fold`, and these.

    Returns:
        The network, and the pairs (batch norm, layer it was folded into).
    """
    module, example = copy_network(float_model.module).eval().requires_grad_(False), float_model.example(2)
    make_visible(module, example)
    return module, fold_batch_norms(module, example) if fold else []


def _settled(scheme: QuantScheme, flow: Flow, name: str) -> QuantScheme:
    """The scheme without `attention` where that changes nothing: then files say what they said before there was it."""
    if scheme.attention is None:
        return scheme
    found = any(one.name in ATTENTION or flow.multiplies_activations(one) for one in flow.operations)
    if not found and scheme.attention.softmax is not None:
        raise SchemeError(
            f"{name}: scheme.attention names a softmax, and no attention was found: of the {len(flow.operations)}"
            f" operations outside of layers none is {' or '.join(ATTENTION)} or multiplies (matmul, bmm, einsum and the"
            " like) two matrices that both depend on the input; leave scheme.attention out"
        )
    if found and (scheme.deploy == "papers" or scheme.attention != AttentionScheme()):
        return scheme
    return scheme.model_copy(update={"attention": None})


def _count(float_model: FloatModel, parts: Parts, example: Inputs) -> None:
    """Find all matrix products, show every quantizer what it reads, and require that every one runs."""
    ran: set[int] = set()

    def show(quantizer: ActivationQuantizer, args: tuple[torch.Tensor, ...]) -> None:
        quantizer.fit_to(args[0])
        ran.add(id(quantizer))

    hooks = [(quantizer, show) for quantizer in parts.quantizers.values()]
    examples = example, float_model.example(3)
    off = switched(parts.layers.values(), parts.quantizers.values(), weights=False, activations=False)
    with off, hooked(pre=hooks):
        parts.products = find_products(parts.module, examples, float_model.module)
    idle = [name for name, quantizer in parts.quantizers.items() if id(quantizer) not in ran]
    if idle:
        raise UnsupportedModelError(
            f"{float_model.name}: the quantizer {idle[0]} would never run, because something keeps the forward"
            " of that module's class from being called; put the module on the scheme's ignore list"
        )


class _Insertion:
    """Puts quantizers into a network."""

    def __init__(self, float_model: FloatModel, parts: Parts) -> None:
        self._scheme = parts.scheme
        self._parts = parts
        self._module = parts.module
        self._device = float_model.device
        self._name, self._forward = float_model.name, float_model.module.forward
        self._gives_logits = float_model.task == "classify"
        self._whole = whole_names(parts.splits)

    def run(self, seen: Trace, order: Sequence[str], example: Inputs) -> list[ActivationQuantizer]:
        """Put quantizers in and return those of the network's inputs.

        Args:
            seen: a forward pass of the network.
            order: its layers in execution order.
            example: some samples.
        """
        groups = shared_inputs(seen, order)
        behind = order[len(self._parts.splits.get(self._whole.get(order[0], ""), order[:1])) :]
        second = next((set(group) for group in groups if behind and behind[0] in group), set(behind[:1]))
        if self._scheme.deploy == "full":
            return self._where_made(seen, order, tuple(second), example)
        self._where_read(seen, order, tuple(second), groups, example)
        given = set(seen.inputs)
        return [
            layer.input_quantizer
            for name, layer in self._parts.layers.items()
            if layer.input_quantizer is not None and given.intersection(seen.calls(name)[0].inputs[:1])
        ]

    def _where_read(
        self,
        seen: Trace,
        order: Sequence[str],
        second: Sequence[str],
        groups: Sequence[Sequence[str]],
        example: Inputs,
    ) -> None:
        """Put quantizers in where layers read tensors and, if the scheme says so, where products do."""
        modulated, rotated = self._scheme.modulation, self._scheme.rotation
        at_entries = self._scheme.shortcuts and modulated is None and rotated is None
        entries = block_inputs(seen, self._parts.units["block"], order) if at_entries else {}
        flow, scopes = Flow(seen, order), {}
        if self._scheme.attention is not None:
            scopes = watch_operations(self._module, seen, order, ATTENTION)
            flow = self._seen_again(order, example)
        named = readable(flow) if scopes else ()
        plan = self._scheme.resolve(order, second, named, self._whole, _image_readers(seen, order))
        differences: dict[str, QuantArgs] = {}
        if modulated is not None:
            plan, differences = modulated_plan(plan, modulated)
        if rotated is not None:
            plan = rotated_plan(self._module, plan)
        placement = ReadPlacement(flow, self._scheme, plan, groups, entries)
        self._parts.operations = placement.rows()
        reads: dict[str, ActivationQuantizer] = {}
        for tensor in placement.tensors:
            quantizer = self._add(tensor.name, tensor.args, tensor.layers)
            if tensor.softmax:
                self._parts.softmaxes.append(tensor.name)
            if tensor.block is None:
                reads.update(dict.fromkeys(tensor.layers, quantizer))
            else:
                quantize_block(get_module(self._module, tensor.block), quantizer)
            for operand in tensor.operands:
                scope = scopes[operand.module]
                scope.quantize_operand(operand.operation, operand.index, quantizer, flow.seen.counts)
            if not tensor.layers:
                self._parts.operation_quantizers.append(quantizer)
        self._insert_layers(order, plan, reads, {}, bool(scopes), differences)
        if modulated is not None:
            run = SamplerRun(self._name, self._forward)
            modulation = modulate(self._module, run, modulated, differences, groups, seen, example)
            parts = self._parts.layers.values(), self._parts.quantizers.values()
            with switched(*parts, weights=False, activations=False):
                require_linear(self._module, modulation, example)
            self._parts.modulation = modulation

    def _seen_again(self, order: Sequence[str], example: Inputs) -> Flow:
        """Another forward pass, once functions that hide operations show them."""
        with torch.no_grad():
            return Flow(trace(self._module, example), order, self._parts.splits)

    def _where_made(
        self, seen: Trace, order: Sequence[str], second: Sequence[str], example: Inputs
    ) -> list[ActivationQuantizer]:
        """Put quantizers in where tensors are made, for all that integer kernels read and put out.

        Returns those of the network's inputs.
        """
        scopes = watch_operations(self._module, seen, order, KERNELS)
        flow = self._seen_again(order, example)
        plan = self._scheme.resolve(order, second, flow.names, self._whole, _image_readers(seen, order))
        placement = Placement(flow, self._scheme, plan)
        self._parts.operations = placement.rows()
        self._parts.output_quantizers = output_quantizers(placement)
        reads, puts_out, placed, of_inputs = {}, {}, {}, []
        for tensor in placement.tensors:
            name = f"{tensor.layers[0]}.input_quantizer" if tensor.place is None else tensor.place.name
            quantizer = self._add(name, tensor.args, tensor.layers)
            if tensor.is_output and self._gives_logits:
                quantizer.headroom = _LOGITS_HEADROOM
            if tensor.is_input:
                of_inputs.append(quantizer)
            if tensor.is_softmax:
                self._parts.softmaxes.append(name)
            if tensor.place is None:
                reads.update(dict.fromkeys(tensor.layers, quantizer))
                continue
            placed[name] = quantizer
            if tensor.place.operation:
                scopes[tensor.place.module].quantize_operation(tensor.place.operation, quantizer, flow.seen.counts)
                self._parts.operation_quantizers.append(quantizer)
            else:
                puts_out[tensor.place.module] = quantizer
        self._insert_layers(order, plan, reads, puts_out, True)
        quantizers = self._parts.quantizers.values()
        # what decodes a weight is no operation of the network
        with switched(self._parts.layers.values(), quantizers, weights=False, activations=True):
            check_placement(self._module, placement, placed, tuple(reads.values()), example)
        return of_inputs

    def _add(self, name: str, args: QuantArgs, layers: Iterable[str]) -> ActivationQuantizer:
        """A quantizer of what these layers read."""
        quantizer = new_quantizer(args).to(self._device)
        quantizer.channel_dim = next((channel_dim(get_module(self._module, name)) for name in layers), -1)
        self._parts.quantizers[name] = quantizer
        self._parts.reads.update(dict.fromkeys(layers, name))
        return quantizer

    def _insert_layers(
        self,
        order: Sequence[str],
        plan: Mapping[str, LayerScheme],
        reads: Mapping[str, ActivationQuantizer],
        puts_out: Mapping[str, ActivationQuantizer],
        watched: bool,
        differences: Container[str] = (),
    ) -> None:
        """Turn layers into quantized ones; where operations are watched, what float layers compute is none of them."""
        for name in order:
            layer, scheme, weight_quantizer = get_module(self._module, name), plan.get(name, LayerScheme()), None
            if scheme.weights is not None:
                weight_quantizer = WeightQuantizer(weight_layout(layer), scheme.weights, name).to(self._device)
            if weight_quantizer is not None or scheme.input_activations is not None or name in differences:
                parts = weight_quantizer, reads.get(name), puts_out.get(name)
                kind = ModulatedLayer if name in differences else QuantLayer
                if self._scheme.rotation is not None:
                    self._parts.layers[name] = rotated_layer(layer, self._scheme.rotation, *parts)
                else:
                    self._parts.layers[name] = quantize_layer(layer, *parts, kind)
            elif watched:
                quantize_layer(layer, None, None, puts_out.get(name))
