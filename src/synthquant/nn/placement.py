"""Which tensors are quantized under `deploy: full`, read off one forward pass.

Integer kernels read codes and write codes, so what they read and what they write is quantized: layers, sums and
concatenations and products of two tensors of data, average pooling, sigmoid, and the products of attention (read only:
what they write is scaled and softmaxed in floating point). A ReLU or clipping right behind such an operation is part of
its kernel, so the tensor between the two is not quantized. Every tensor is quantized once, where it is made; views,
slices, copies and max pooling of it keep its grid.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from synthquant.models.trace import Operation, Trace, Value
from synthquant.nn.moves import JOINS, is_move
from synthquant.nn.pieces import Pieces
from synthquant.nn.scheme import LayerScheme, QuantArgs, QuantScheme

_FUSED = frozenset(("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clip"))
_SUMS = frozenset(("add", "iadd", "radd"))
_PRODUCTS = frozenset(("mul", "imul", "rmul", "multiply"))
_MATRIX_PRODUCTS = frozenset(("matmul", "rmatmul", "bmm", "einsum"))
# Products that runtimes are not given as integer kernels; the latter add that of their second and third tensor to one.
_OTHER_PRODUCTS = frozenset(("mm", "inner", "tensordot"))
_ADDING_PRODUCTS = frozenset(("baddbmm", "addmm", "addbmm"))
_POOLINGS = frozenset(f"{kind}_pool{dimensions}d" for kind in ("avg", "adaptive_avg") for dimensions in (1, 2, 3))
_ACTIVATIONS = frozenset(("sigmoid", "leaky_relu"))
# They return nothing that could be replaced.
_STATEMENTS = frozenset(("setitem", "set_"))
_LEFT = "the scheme leaves its output in float"


@dataclass(frozen=True)
class Place:
    """Where a tensor is made: by a layer, or by an operation in a module's own forward."""

    module: str
    """The layer, or the module whose operation it is; "" is the network itself."""
    operation: str = ""
    """For example `add_0`: the first `add` of each call of the module; empty for a layer."""

    @property
    def name(self) -> str:
        """Name of a quantizer that stands there."""
        end = self.operation or "output_quantizer"
        return f"{self.module}.{end}" if self.module else end


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor that is quantized."""

    place: Place | None
    """Where it is made; none: not by an operation that was seen (an input), so that layers quantize what they read."""
    args: QuantArgs
    layers: tuple[str, ...]
    """Layers that read it, in execution order."""
    is_input: bool = False
    """It is what the network is given."""
    is_output: bool = False
    """The network returns it, or a view of it."""
    is_softmax: bool = False
    """A softmax puts it out."""


@dataclass(frozen=True)
class OperationRow:
    """What quantization does to one operation outside layers.

    Attributes:
        name: module and operation, for example `layer1.0.iadd_0`.
        kind: name of the function.
        input_bits: for each tensor of data that it reads, or factor that it multiplies, its bits, none for a float one.
        output_bits: bits of what it puts out, behind a fused activation; none for a float tensor.
        input_kinds: the kinds of the quantizers of what it reads, each once.
        reason: why it puts out a float tensor, where the scheme names that.
    """

    name: str
    kind: str
    input_bits: tuple[int | None, ...]
    output_bits: int | None
    input_kinds: tuple[str, ...] = ()
    reason: str = ""


class Flow:
    """The tensors of one forward pass, with views of a tensor told apart from new tensors."""

    def __init__(self, seen: Trace, layers: Sequence[str], splits: Collection[str] = ()) -> None:
        """Find the operations of a trace and what reads what they make.

        Args:
            seen: a forward pass.
            layers: names of the layers; what happens inside them is of no interest.
            splits: names of split layers, whose parts are layers.
        """
        self.seen = seen
        self.layers = tuple(layers)
        self.pieces = Pieces(self, splits)
        self.operations: list[Operation] = []
        self._places: dict[int, Place] = {}
        self._readers: dict[int, list[Operation | str]] = {}
        self._sort()

    def _sort(self) -> None:
        known = set(self.layers)
        for operation in self.seen.operations:
            if operation.owner is None or any(call.name in known for call in self.seen.enclosing(operation.call)):
                continue
            place = Place(self.seen.module_calls[operation.owner].name, operation.key)
            self.operations.append(operation)
            one = len(operation.outputs) == 1 and operation.name not in _STATEMENTS
            if (one or is_move(operation)) and not self.pieces.cuts(operation):
                self._places.update((value.index, place) for value in operation.outputs)
            for value in dict.fromkeys(operation.inputs):
                self._readers.setdefault(value.index, []).append(operation)
        for name in self.layers:
            for call in self.seen.calls(name):
                self._places.update((value.index, Place(name)) for value in call.outputs)
                for value in call.inputs[:1]:
                    self._readers.setdefault(value.index, []).append(name)

    def is_activation(self, value: Value) -> bool:
        """Whether a value holds real numbers that are data, or made from what a layer put out as a learned query is."""
        return value.is_floating_point and self._is_data(value)

    def _is_data(self, value: Value) -> bool:
        return value.from_input or value.index in self._behind_layers

    @cached_property
    def _behind_layers(self) -> set[int]:
        found = {value.index for name in self.layers for call in self.seen.calls(name) for value in call.outputs}
        for operation in self.operations:
            if any(value.index in found for value in operation.inputs):
                found.update(value.index for value in operation.outputs)
        return found

    def multiplies_activations(self, operation: Operation) -> bool:
        """Whether an operation multiplies matrices, and all of them are activations."""
        indices = factors(operation)
        return bool(indices) and all(self.is_activation(operation.inputs[index]) for index in indices)

    def is_softmax(self, value: Value) -> bool:
        """Whether a softmax made a value."""
        operation = self.seen.producer(value)
        return operation is not None and operation.name == "softmax"

    def is_made_by_layers(self, value: Value) -> bool:
        """Whether a value depends on what a layer put out."""
        return value.index in self._behind_layers

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what quantizers can stand behind: operations that are more than views, and layers."""
        places = [self.place(operation.outputs[0]) for operation in self.operations if not is_move(operation)]
        places += [Place(name) for name in self.layers]
        return tuple(dict.fromkeys(place.name for place in places if place is not None))

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What the network is given, constants left out."""
        return self.seen.inputs

    def place(self, value: Value) -> Place | None:
        """Where a value is made."""
        return self._places.get(value.index)

    def source(self, value: Value) -> Value:
        """The tensor whose values `value` holds, through views and the like."""
        while True:
            value = self.pieces.origin(value)
            place, operation = self.place(value), self.seen.producer(value)
            if place is None or not place.operation or operation is None or not is_move(operation):
                return value
            read = [operand for operand in operation.inputs if self._is_data(operand)]
            if not read:
                return value
            value = read[0]

    def operands(self, operation: Operation) -> list[Value]:
        """The tensors of data that an operation reads; a product also those that are computed from layers alone."""
        if factors(operation):
            return [value for value in operation.inputs if self._is_data(value)]
        return [value for value in operation.inputs if value.from_input]

    def sources(self, operation: Operation) -> set[Value]:
        """The same tensors where they are made."""
        return {self.source(operand) for operand in self.operands(operation)}

    def readers(self, value: Value) -> Iterator[Operation | str]:
        """The operations and layers that read a value directly."""
        yield from self._readers.get(value.index, ())

    def final_readers(self, value: Value) -> Iterator[Operation | str]:
        """The operations and layers that read a value or what holds its values."""
        for reader in self.readers(value):
            if isinstance(reader, Operation) and self.pieces.is_undone(reader):
                for behind in (*self.pieces.made_of(value), reader.outputs[0]):
                    yield from self.final_readers(behind)
            elif isinstance(reader, Operation) and is_move(reader) and not self.pieces.cuts(reader):
                for output in reader.outputs:
                    yield from self.final_readers(output)
            else:
                yield reader

    def behind_fused(self, value: Value) -> list[Value]:
        """What a kernel that makes `value` puts out: that, or what fused activations make of it if only they read it.

        A value that the network returns is read by others.
        """
        readers = list(self.readers(value))
        if not readers or value in self.outputs:
            return [value]
        fused = [reader for reader in readers if isinstance(reader, Operation) and reader.name in _FUSED]
        return [reader.outputs[0] for reader in fused] if len(fused) == len(readers) else [value]

    @cached_property
    def outputs(self) -> frozenset[Value]:
        """What the network returns, and the tensors whose values it holds."""
        returned = self.seen.calls("")[0].outputs
        return frozenset((*returned, *(self.source(value) for value in returned)))

    def reads_integers(self, operation: Operation) -> bool:
        """Whether an integer kernel can run the operation."""
        if self.pieces.is_undone(operation):
            return False
        return self.could_read_integers(operation)

    def could_read_integers(self, operation: Operation) -> bool:
        """Whether one could if all that reads its result did."""
        name, two = operation.name, len(set(self.operands(operation))) > 1
        if name in _SUMS or name in _PRODUCTS or name in JOINS or name in _MATRIX_PRODUCTS:
            return two
        return name in _POOLINGS or name in _ACTIVATIONS or (name == "mean" and _is_pooling(operation))

    def writes_integers(self, operation: Operation) -> bool:
        """Whether that kernel puts out codes as well."""
        return operation.name not in _MATRIX_PRODUCTS and self.reads_integers(operation)


class Placement:
    """The tensors to quantize under a scheme.

    Attributes:
        flow: the forward pass.
    """

    def __init__(self, flow: Flow, scheme: QuantScheme, plan: Mapping[str, LayerScheme]) -> None:
        """Decide.

        Args:
            flow: a forward pass with attention made visible.
            scheme: what was asked for.
            plan: what that is for each layer; layers that are not in it stay in floating point.
        """
        self.flow = flow
        self._scheme = scheme
        self._plan = plan
        self._tensors: dict[int, PlacedTensor] = {}
        # A module that runs several times quantizes alike each time.
        self._merged: dict[Place, PlacedTensor] = {}
        for value in sorted(self._wanted(), key=lambda value: value.index):
            tensor = self._placed(value)
            if tensor is not None:
                self._tensors[value.index] = tensor
                if tensor.place is not None:
                    self._merged[tensor.place] = _merged(self._merged.get(tensor.place, tensor), tensor)

    @property
    def tensors(self) -> list[PlacedTensor]:
        """What is quantized, in order of appearance."""
        found = self._tensors.values()
        return list(dict.fromkeys(t if t.place is None else self._merged[t.place] for t in found))

    def tensor(self, value: Value) -> PlacedTensor | None:
        """The quantized tensor whose values `value` holds; none if it stays float."""
        found = self._tensors.get(self.flow.source(value).index)
        return found if found is None or found.place is None else self._merged[found.place]

    def bits(self, value: Value) -> int | None:
        """Bits of a value; none if it stays float."""
        found = self.tensor(value)
        return None if found is None else found.args.num_bits

    def rows(self) -> list[OperationRow]:
        """What becomes of each operation that is more than a view, in execution order."""
        rows: dict[str, OperationRow] = {}
        for operation in self.flow.operations:
            place = self.flow.place(operation.outputs[0])
            data = self.flow.operands(operation)
            if place is None or is_move(operation) or not data:
                continue
            result = self.flow.behind_fused(operation.outputs[0])[0]
            read = [self.tensor(operand) for operand in data]
            bits = tuple(None if tensor is None else tensor.args.num_bits for tensor in read)
            kinds = tuple(dict.fromkeys(tensor.args.kind for tensor in read if tensor is not None))
            reason = self._left_in_float(self.flow.place(result) or place)
            rows.setdefault(
                place.name, OperationRow(place.name, operation.name, bits, self.bits(result), kinds, reason)
            )
        for place in (Place(name) for name in self.flow.layers):
            if reason := self._left_in_float(place):
                rows[place.name] = OperationRow(place.name, "output", (None,), None, (), reason)
        return list(rows.values())

    def _left_in_float(self, place: Place) -> str:
        return _LEFT if self._scheme.operation(place.name) is None else ""

    def _wanted(self) -> set[Value]:
        """Everything that an integer kernel reads or writes."""
        flow, read, written = self.flow, set(), set()
        for operation in flow.operations:
            if self._is_ignored(operation):
                continue
            if flow.reads_integers(operation):
                read.update(flow.sources(operation))
            if flow.writes_integers(operation):
                written.update(flow.behind_fused(operation.outputs[0]))
        for name in flow.layers:
            if not self._reads_codes(name):
                continue
            for call in flow.seen.calls(name):
                read.update(flow.source(value) for value in call.inputs[:1])
                if self._plan[name].weights is not None:
                    written.update(output for value in call.outputs for output in flow.behind_fused(value))
        wanted = read | {value for value in written if not self._is_left_alone(value)}
        return {value for value in wanted if value.is_floating_point}

    def _is_ignored(self, operation: Operation) -> bool:
        place = self.flow.place(operation.outputs[0])
        return place is not None and self._scheme.ignores(place.name)

    def _reads_codes(self, layer: str) -> bool:
        return layer in self._plan and self._plan[layer].input_activations is not None

    def _is_left_alone(self, value: Value) -> bool:
        """Whether all that reads it was asked to compute in floating point; it then gets what it was promised."""
        readers = list(self.flow.final_readers(value))
        return bool(readers) and all(
            not self._reads_codes(reader)
            if isinstance(reader, str)
            else self._is_ignored(reader) or self.flow.pieces.cuts(reader)
            for reader in readers
        )

    def _placed(self, value: Value) -> PlacedTensor | None:
        readers = dict.fromkeys(reader for reader in self.flow.final_readers(value) if isinstance(reader, str))
        layers = tuple(name for name in self.flow.layers if name in readers)
        place = self.flow.place(value)
        asked = [self._plan[name].input_activations for name in layers if name in self._plan]
        candidates = [args for args in asked if args is not None]
        if place is None:
            layers = tuple(name for name in layers if self._reads_codes(name))
            if not layers:
                return None
        args = max(candidates, key=lambda args: args.num_bits) if candidates else self._default(value, place)
        if args is None:
            return None
        is_output = value in self.flow.outputs
        if is_output:
            # What a search that minimises the error cuts off is the logits that decide.
            args = args.at_least(8).model_copy(update={"observer": args.observer or "minmax"})
        is_input, is_softmax = value in self.flow.inputs, self.flow.is_softmax(value)
        return PlacedTensor(place, args, layers, is_input, is_output, is_softmax)

    def _default(self, value: Value, place: Place | None) -> QuantArgs | None:
        """For tensors that no layer reads."""
        first = self.flow.seen.calls(self.flow.layers[0])
        after_first = [output for call in first for made in call.outputs for output in self.flow.behind_fused(made)]
        return self._scheme.operation(
            place.name if place else "", after_first=value in after_first, softmax=self.flow.is_softmax(value)
        )


def _merged(one: PlacedTensor, other: PlacedTensor) -> PlacedTensor:
    args = max(one.args, other.args, key=lambda args: args.num_bits)
    layers = tuple(dict.fromkeys((*one.layers, *other.layers)))
    is_output = one.is_output or other.is_output
    return PlacedTensor(one.place, args, layers, one.is_input, is_output, one.is_softmax)


def factors(operation: Operation) -> Sequence[int]:
    """Which of the tensors that an operation reads it multiplies as matrices; none if it does not."""
    if operation.name in _ADDING_PRODUCTS:
        return range(1, len(operation.inputs))
    products = operation.name in _MATRIX_PRODUCTS or operation.name in _OTHER_PRODUCTS
    return range(len(operation.inputs) if products and len(operation.inputs) > 1 else 0)


def _is_pooling(operation: Operation) -> bool:
    """Whether a mean goes over all positions and leaves the channels, of feature maps or of tokens."""
    read, made = operation.inputs[0].shape, operation.outputs[0].shape
    rest = [size for size in made[1:] if size != 1]
    if len(read) == 4:
        return rest in ([read[1]], [read[3]])
    return len(read) == 3 and rest == [read[2]]
