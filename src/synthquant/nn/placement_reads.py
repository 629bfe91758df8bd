"""Which tensors are quantized in the papers' way: what layers read and, with `scheme.attention`, what products read.

What reads the very same tensor in the same bits shares a quantizer. A product of attention reads its factors through
quantizers of its own: query and key, the softmax and the value, also where they are slices of one tensor. What it puts
out stays in floating point, as do sums of residual branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from synthquant.models.trace import Value
from synthquant.nn.moves import is_move
from synthquant.nn.placement import Flow, OperationRow, factors
from synthquant.nn.scheme import LayerScheme, QuantArgs, QuantScheme


@dataclass(frozen=True)
class Operand:
    """What one operation reads."""

    module: str
    """The module whose operation it is; "" is the network itself."""
    operation: str
    """For example `matmul_0`: the first `matmul` of each call of the module."""
    index: int
    """Number among the tensors of the call."""

    @property
    def name(self) -> str:
        """Name of a quantizer that stands there."""
        place = f"{self.module}.{self.operation}" if self.module else self.operation
        return f"{place}.input_quantizer_{self.index}"


@dataclass
class ReadTensor:
    """A tensor that is quantized where it is read.

    Attributes:
        name: of its quantizer.
        args: how.
        layers: that read it.
        operands: of operations that read it.
        block: the block at whose entry it is quantized, for all that reads it there; none: each reader does.
        softmax: a softmax puts it out.
    """

    name: str
    args: QuantArgs
    layers: tuple[str, ...]
    operands: list[Operand]
    block: str | None = None
    softmax: bool = False


def readable(flow: Flow) -> tuple[str, ...]:
    """Names of operations that patterns of a scheme may match: products, and softmaxes, which products read."""
    made = (operation for operation in flow.operations if factors(operation) or operation.name == "softmax")
    places = (flow.place(operation.outputs[0]) for operation in made)
    return tuple(dict.fromkeys(place.name for place in places if place is not None))


class ReadPlacement:
    """The tensors to quantize under a scheme.

    Attributes:
        tensors: those at entries of blocks first, then what layers read, then what products read.
    """

    def __init__(
        self,
        flow: Flow,
        scheme: QuantScheme,
        plan: Mapping[str, LayerScheme],
        groups: Sequence[Sequence[str]],
        entries: Mapping[str, Sequence[str]],
    ) -> None:
        """Decide.

        Args:
            flow: a forward pass, with attention made visible if its products are to be quantized.
            scheme: what was asked for.
            plan: what that is for each layer; layers that are not in it stay in floating point.
            groups: layers that read the very same tensor.
            entries: blocks whose shortcut reads what these of their layers read.
        """
        self._flow = flow
        self._scheme = scheme
        self._plan = plan
        self.tensors: list[ReadTensor] = []
        self._add_entries(entries)
        self._add_layers(groups)
        if scheme.attention is not None:
            self._add_operands()

    def rows(self) -> list[OperationRow]:
        """What becomes of each operation that is more than a view, in execution order."""
        args = {operand: tensor.args for tensor in self.tensors for operand in tensor.operands}
        rows: dict[str, OperationRow] = {}
        for operation in self._flow.operations:
            place = self._flow.place(operation.outputs[0])
            if place is None or is_move(operation) or not self._flow.operands(operation):
                continue
            data = [index for index, value in enumerate(operation.inputs) if value.from_input]
            indices = factors(operation) or data
            read = [args.get(Operand(place.module, place.operation, index)) for index in indices]
            bits = tuple(None if one is None else one.num_bits for one in read)
            kinds = tuple(dict.fromkeys(one.kind for one in read if one is not None))
            rows.setdefault(place.name, OperationRow(place.name, operation.name, bits, None, kinds))
        return list(rows.values())

    def _add_entries(self, entries: Mapping[str, Sequence[str]]) -> None:
        """Tensors that a block takes in once for all."""
        for block, names in entries.items():
            args = {self._plan[name].input_activations for name in names if name in self._plan}
            wanted = next(iter(args), None)
            if len(args) == 1 and wanted is not None and all(name in self._plan for name in names):
                self.tensors.append(ReadTensor(f"{block}.input_quantizer", wanted, tuple(names), [], block))

    def _add_layers(self, groups: Sequence[Sequence[str]]) -> None:
        """Tensors that layers read."""
        partners = {name: tuple(group) for group in groups for name in group}
        done = {name for tensor in self.tensors for name in tensor.layers}
        for name in self._flow.layers:
            if name not in self._plan or name in done:
                continue
            wanted = self._plan[name].input_activations
            same = [
                other
                for other in partners.get(name, (name,))
                if other in self._plan and other not in done and self._plan[other].input_activations == wanted
            ]
            layers = tuple(dict.fromkeys((*same, name)))
            done.update(layers)
            if wanted is not None:
                self.tensors.append(ReadTensor(f"{name}.input_quantizer", wanted, layers, []))

    def _add_operands(self) -> None:
        """Tensors that products of two activations read; a module that runs several times reads alike each time."""
        known: dict[tuple[int, QuantArgs], ReadTensor] = {}
        for tensor in self.tensors:
            layers = tensor.layers if tensor.block is None else ()  # else they read what the block has quantized
            for call in (call for name in layers for call in self._flow.seen.calls(name)):
                known.update(((value.index, tensor.args), tensor) for value in call.inputs[:1])
        standing: dict[Operand, ReadTensor] = {}
        for operand, value, args in self._operands():
            tensor = standing.get(operand) or known.get((value.index, args)) or ReadTensor(operand.name, args, (), [])
            if not tensor.layers and not tensor.operands:
                self.tensors.append(tensor)
            if operand not in standing:
                tensor.operands.append(operand)
                tensor.softmax = tensor.softmax or self._flow.is_softmax(self._flow.source(value))
            standing[operand] = known[value.index, args] = tensor

    def _operands(self) -> Iterator[tuple[Operand, Value, QuantArgs]]:
        for operation in self._flow.operations:
            place = self._flow.place(operation.outputs[0])
            if place is None or self._scheme.ignores(place.name):
                continue
            if self._flow.multiplies_activations(operation):
                for index in factors(operation):
                    args = self._args(place.name, operation.inputs[index])
                    if args is not None:
                        yield Operand(place.module, place.operation, index), operation.inputs[index], args

    def _args(self, product: str, value: Value) -> QuantArgs | None:
        """Of a softmax by its own name, of any other factor by that of the product."""
        source = self._flow.source(value)
        place = self._flow.place(source)
        if place is not None and self._flow.is_softmax(source):
            return self._scheme.operation(place.name, softmax=True)
        return self._scheme.operation(product)
