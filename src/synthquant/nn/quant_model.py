"""The quantized copy of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from synthquant.core.errors import ModelError, SchemeError, UnsupportedModelError
from synthquant.core.modules import get_module, hooked
from synthquant.models.batch_norm import fold_batch_norms
from synthquant.models.blocks import QUANTIZABLE, Granularity, Unit, block_inputs, find_units, shared_inputs
from synthquant.models.float_model import FloatModel
from synthquant.models.products import Product, find_products
from synthquant.models.trace import Trace, trace
from synthquant.nn.activation_quantizers import ActivationQuantizer, new_quantizer
from synthquant.nn.coverage import CoverageRow, coverage_rows
from synthquant.nn.equalization import Equalization
from synthquant.nn.layers import QuantLayer, quantize_block, quantize_layer, weight_layout
from synthquant.nn.operations import watch_operations
from synthquant.nn.own_forward import copy_network
from synthquant.nn.placement import Flow, OperationRow, Placement
from synthquant.nn.placement_check import check_placement
from synthquant.nn.scheme import LayerScheme, QuantArgs, QuantScheme
from synthquant.nn.weight_quantizers import WeightQuantizer

# Synthetic images are classified with less confidence than real ones: on zoo/cifar10-resnet20 the largest logit of 256
# of them was 0.2 (zeroq), 0.4 (noise) and 0.9 (genie_d) of that of 256 training images. A wider grid costs a bit, one
# that is too narrow makes ties.
_LOGITS_HEADROOM = 2.0


class QuantModel(nn.Module):
    """A copy of a float model in which layers hold integer codes and tensors are fake-quantized.

    Batch norms are folded, layers turned into quantized ones where they stand in the module tree, and quantizers shared
    where several layers read the same tensor. Nothing is traced symbolically; one forward pass of a small example tells
    which tensor flows where. Inputs are normalised images `[B, 3, H, W]`, outputs logits `[B, num_classes]`.

    Attributes:
        float_model: what it was made from.
        scheme: what was asked for.
        module: the quantized network.
        folded: pairs (batch norm, layer it was folded into).
        equalization: how the folded network was changed before it was quantized, or none.
        layers: quantized layers by name, in execution order.
        quantizers: activation quantizers by name, each once.
        reads: for each layer whose input is quantized, the name of the quantizer of that tensor: at the layer, at the
            entry of a block around it, or (`deploy: full`) where the tensor is made.
        operations: what becomes of the operations outside layers, in execution order (`deploy: full`).
        loaded: the state came from a checkpoint, so that float weights are not there.
    """

    def __init__(self, float_model: FloatModel, scheme: QuantScheme, module: nn.Module) -> None:
        """Wrap an already folded copy; use `build`."""
        super().__init__()
        self.float_model = float_model
        self.scheme = scheme
        self.module = module
        self.folded: list[tuple[str, str]] = []
        self.layers: dict[str, QuantLayer] = {}
        self.quantizers: dict[str, ActivationQuantizer] = {}
        self.reads: dict[str, str] = {}
        self.operations: list[OperationRow] = []
        self.operation_quantizers = nn.ModuleList()
        self.loaded = False
        self.equalization: Equalization | None = None
        self._products: list[Product] = []
        self._units: dict[Granularity, list[Unit]] = {}

    @classmethod
    def build(
        cls, float_model: FloatModel, scheme: QuantScheme | str, equalization: Equalization | None = None
    ) -> QuantModel:
        """Copy `float_model`, fold its batch norms and put in quantizers by `scheme`; ranges are not calibrated yet.

        With an `equalization` the folded copy is changed by it first: its float side then is the equalised network.

        Raises:
            SchemeError: the scheme quantizes nothing, or a pattern matches nothing.
            ModelError: the equalisation is one of another network.
        """
        scheme = QuantScheme.parse(scheme)
        module, folded = folded_copy(float_model)
        example = float_model.example_input(2)
        if equalization is not None:
            equalization.apply(module)
        model = cls(float_model, scheme, module)
        model.folded, model.equalization = folded, equalization
        with torch.no_grad():
            seen = trace(module, example)
        order = [name for name in seen.order if isinstance(get_module(module, name), QUANTIZABLE)]
        if not order:
            raise SchemeError(f"{float_model.name}: no convolution or linear layer to quantize")
        for granularity in ("block", "layer", "network"):
            model._units[granularity] = find_units(module, example, granularity, set(order), seen)
        groups = shared_inputs(seen, order)
        second = next((set(group) for group in groups if len(order) > 1 and order[1] in group), set(order[1:2]))
        if scheme.deploy == "full":
            of_image = model._insert_where_made(seen, order, tuple(second), example)
        else:
            plan = scheme.resolve(order, tuple(second))
            entries = block_inputs(seen, model._units["block"], order) if scheme.shortcuts else {}
            model._insert(order, plan, groups, entries)
            of_image = model._image_quantizers(seen)
        if not model.layers:
            raise SchemeError(f"{float_model.name}: the scheme leaves all {len(order)} layers in floating point")
        model._count(example)
        for quantizer in of_image:  # calibration images may not reach black or white
            quantizer.fix(*float_model.preprocess.limits)
        return model.eval()

    def _count(self, example: torch.Tensor) -> None:
        """Find all matrix products, show every quantizer what it reads, and require that every one runs."""
        ran: set[int] = set()

        def show(quantizer: ActivationQuantizer, args: tuple[torch.Tensor, ...]) -> None:
            quantizer.fit_to(args[0])
            ran.add(id(quantizer))

        hooks = [(quantizer, show) for quantizer in self.quantizers.values()]
        examples = example, self.float_model.example_input(3)
        with self.mode(weights=False, activations=False), hooked(pre=hooks):
            self._products = find_products(self.module, examples, self.float_model.module)
        idle = [name for name, quantizer in self.quantizers.items() if id(quantizer) not in ran]
        if idle:
            raise UnsupportedModelError(
                f"{self.float_model.name}: the quantizer {idle[0]} would never run, because something keeps the forward"
                " of that module's class from being called; put the module on the scheme's ignore list"
            )

    def _image_quantizers(self, seen: Trace) -> list[ActivationQuantizer]:
        """Quantizers of layers that read the image as it is."""
        (image, *_) = seen.calls("")[0].inputs
        return [
            layer.input_quantizer
            for name, layer in self.layers.items()
            if layer.input_quantizer is not None and seen.calls(name)[0].inputs[:1] == (image,)
        ]

    def _insert(
        self,
        order: Sequence[str],
        plan: Mapping[str, LayerScheme],
        groups: Sequence[Sequence[str]],
        entries: Mapping[str, Sequence[str]],
    ) -> None:
        """Put quantizers in: at block entries first, then one for each group of layers that read the same tensor."""
        readers: dict[str, ActivationQuantizer | None] = {}
        for block, names in entries.items():
            args = {plan[name].input_activations for name in names if name in plan}
            wanted = next(iter(args), None)
            if len(args) == 1 and wanted is not None and all(name in plan for name in names):
                entry = self._add(f"{block}.input_quantizer", wanted, names)
                quantize_block(get_module(self.module, block), entry)
                readers.update(dict.fromkeys(names))
        partners = {name: tuple(group) for group in groups for name in group}
        for name in order:
            if name not in plan:
                continue
            if name not in readers:
                wanted = plan[name].input_activations
                same = [
                    other
                    for other in partners.get(name, (name,))
                    if other in plan and other not in readers and plan[other].input_activations == wanted
                ]
                quantizer = self._add(f"{name}.input_quantizer", wanted, (*same, name)) if wanted else None
                readers.update(dict.fromkeys((*same, name), quantizer))
            self._insert_layer(name, plan[name], readers[name], None)

    def _add(self, name: str, args: QuantArgs, layers: Iterable[str]) -> ActivationQuantizer:
        """A quantizer of what these layers read."""
        quantizer = new_quantizer(args).to(self.float_model.device)
        self.quantizers[name] = quantizer
        self.reads.update(dict.fromkeys(layers, name))
        return quantizer

    def _insert_layer(
        self, name: str, scheme: LayerScheme, reads: ActivationQuantizer | None, puts_out: ActivationQuantizer | None
    ) -> None:
        layer, weight_quantizer = get_module(self.module, name), None
        if scheme.weights is not None:
            weight_quantizer = WeightQuantizer(weight_layout(layer), scheme.weights, name).to(self.float_model.device)
        if weight_quantizer is not None or scheme.input_activations is not None:
            self.layers[name] = quantize_layer(layer, weight_quantizer, reads, puts_out)

    def _insert_where_made(
        self, seen: Trace, order: Sequence[str], second: Sequence[str], example: torch.Tensor
    ) -> list[ActivationQuantizer]:
        """Put quantizers in where tensors are made, for all that integer kernels read and put out.

        Returns those of the image.
        """
        scopes = watch_operations(self.module, seen, order)
        with torch.no_grad():  # once more, with attention made visible
            flow = Flow(trace(self.module, example), order, scopes.keys())
        plan = self.scheme.resolve(order, second, flow.names)
        placement = Placement(flow, self.scheme, plan)
        self.operations = placement.rows()
        reads, puts_out, placed, of_image = {}, {}, {}, []
        for tensor in placement.tensors:
            name = f"{tensor.layers[0]}.input_quantizer" if tensor.place is None else tensor.place.name
            quantizer = self._add(name, tensor.args, tensor.layers)
            if tensor.is_output:
                quantizer.headroom = _LOGITS_HEADROOM
            if tensor.is_image:
                of_image.append(quantizer)
            if tensor.place is None:
                reads.update(dict.fromkeys(tensor.layers, quantizer))
                continue
            placed[name] = quantizer
            if tensor.place.operation:
                scopes[tensor.place.module].quantize_operation(tensor.place.operation, quantizer, flow.counts)
                self.operation_quantizers.append(quantizer)
            else:
                puts_out[tensor.place.module] = quantizer
        for name in order:
            if name in plan:
                self._insert_layer(name, plan[name], reads.get(name), puts_out.get(name))
            if name not in self.layers:  # float, but what it computes inside is no operation of the module around it
                quantize_layer(get_module(self.module, name), None, None, puts_out.get(name))
        with self.mode(weights=False, activations=True):  # what decodes a weight is no operation of the network
            check_placement(self, placement, placed, reads.values(), example)
        return of_image

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of normalised images."""
        logits: torch.Tensor = self.module(x)
        return logits

    def units(self, granularity: Granularity = "block") -> list[Unit]:
        """Reconstruction units in execution order, those without a quantized layer left out."""
        return [unit for unit in self._units[granularity] if any(name in self.layers for name in unit.layers)]

    @property
    def first_layer(self) -> str:
        """Name of the layer that runs first, quantized or not."""
        return self._units["layer"][0].layers[0]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.float_model.device

    @contextmanager
    def mode(self, *, weights: bool, activations: bool) -> Iterator[None]:
        """Quantize weights and activations, or not, for a while.

        Raises:
            ModelError: float weights are asked for and the network was loaded from a checkpoint.
        """
        if not weights and self.loaded:
            raise ModelError(f"{self.float_model.name}: loaded from a checkpoint, which holds no float weights")
        former_layers = [(layer, layer.weights_enabled) for layer in self.layers.values()]
        former_quantizers = [(quantizer, quantizer.enabled) for quantizer in self.quantizers.values()]
        try:
            for layer in self.layers.values():
                layer.weights_enabled = weights
            for quantizer in self.quantizers.values():
                quantizer.enabled = activations
            yield
        finally:
            for layer, enabled in former_layers:
                layer.weights_enabled = enabled
            for quantizer, enabled in former_quantizers:
                quantizer.enabled = enabled

    def coverage(self) -> list[CoverageRow]:
        """What becomes of every layer, every other weight and every other matrix product, in execution order."""
        reads = {layer: self.quantizers[name].args for layer, name in self.reads.items()}
        return coverage_rows(self.module, self._products, self.layers, reads, self.operations)

    def input_bits(self, name: str) -> int | None:
        """Bits of the tensor that layer `name` reads, wherever it is quantized; none if it is not."""
        return self.quantizers[self.reads[name]].num_bits if name in self.reads else None

    @property
    def calibrated(self) -> bool:
        """Whether every activation quantizer has its range."""
        return all(quantizer.calibrated for quantizer in self.quantizers.values())

    def require_calibrated(self) -> None:
        """Raise `ModelError` if an activation quantizer has no range yet; names it."""
        missing = [name for name, quantizer in self.quantizers.items() if not quantizer.calibrated]
        if len(missing) == sum(not quantizer.fixed for quantizer in self.quantizers.values()) > 0:
            raise ModelError(f"{self.float_model.name}: not calibrated yet; apply a quantization method first")
        if missing:
            raise ModelError(
                f"{self.float_model.name}: the quantizer {missing[0]} saw no data while ranges were set: the network"
                " does not always run the same modules; put that module on the scheme's ignore list"
            )

    def state(self) -> dict[str, torch.Tensor]:
        """Everything the quantized network consists of, by name; float weights of quantized layers left out.

        `NAME.weight_codes` (uint8 or int16, the weight's shape), `NAME.weight_scale` and `NAME.weight_zero_point` (`[C,
        G, 1]`), the tensors of activation grids (`QUANTIZER.scale` ...), and other parameters and buffers.
        """
        state = self._float_state()
        for name, layer in self.layers.items():
            if layer.weight_quantizer is not None:
                state[f"{name}.weight_codes"] = layer.weight_quantizer.codes
                state[f"{name}.weight_scale"] = layer.weight_quantizer.scale
                state[f"{name}.weight_zero_point"] = layer.weight_quantizer.zero_point
        for name, quantizer in self.quantizers.items():
            state |= {f"{name}.{part}": tensor for part, tensor in quantizer.grid().items()}
        return state

    @property
    def whole_numbers(self) -> set[str]:
        """Names of those tensors of the state, beside codes, that hold whole numbers."""
        weights = {f"{name}.weight_zero_point" for name, layer in self.layers.items() if layer.weight_quantizer}
        grids = {f"{name}.{part}" for name, quantizer in self.quantizers.items() for part in quantizer.whole_numbers}
        return weights | grids

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take a state written by `state`; float weights are dropped.

        Raises:
            ModelError: names or shapes differ; says which.
        """
        for name, layer in self.layers.items():
            if f"{name}.bias" in state:
                layer.make_room_for_bias(state[f"{name}.bias"])
            codes = state.get(f"{name}.weight_codes")
            if layer.weight_quantizer is not None and codes is not None:
                layer.weight_quantizer.make_room_for(codes)
        own = self.state()
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape of", sorted(wrong))):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise ModelError(
                    f"quantized checkpoint does not fit {self.float_model.name}: {what} {', '.join(names[:5])}{more}"
                )
        for name, value in own.items():
            value.copy_(state[name])
        for quantizer in self.quantizers.values():
            quantizer.load_grid(quantizer.grid())
        for layer in self.layers.values():
            layer.drop_float_weight()
        self.loaded = True

    def _float_state(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers that quantization leaves alone."""
        parts: list[nn.Module] = [*self.quantizers.values()]
        parts += [layer.weight_quantizer for layer in self.layers.values() if layer.weight_quantizer is not None]
        own = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}
        own |= {id(layer._parameters["weight"]) for layer in self.layers.values() if layer.weight_quantizer is not None}
        entries = self.module.state_dict(keep_vars=True)
        return {name: value.detach() for name, value in entries.items() if id(value) not in own}


def folded_copy(float_model: FloatModel) -> tuple[nn.Module, list[tuple[str, str]]]:
    """A copy of the network without gradients, batch norms folded, and the pairs (batch norm, layer) of these."""
    module = copy_network(float_model.module).eval().requires_grad_(False)
    _run_layers_themselves(module)
    return module, fold_batch_norms(module, float_model.example_input(2))


def _run_layers_themselves(module: nn.Module) -> None:
    """Keep torch's encoder layer from a fused kernel that reads its layers' weights and never calls them."""
    for part in module.modules():
        if isinstance(part, nn.TransformerEncoderLayer):
            part.activation_relu_or_gelu = 0
