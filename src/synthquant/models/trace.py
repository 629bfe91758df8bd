"""Which tensor flows where: one forward pass of an eager network, watched from outside.

Module calls are seen by hooks, tensor operations by a `TorchFunctionMode`; nothing is traced symbolically, so any
network that runs can be followed. A tensor is told apart by its identity and its version, which every in-place
operation raises: `conv -> relu_ -> x` has two values, before and after `relu_`, although there is one tensor object.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from synthquant.core.modules import eval_mode, hooked
from synthquant.models.operation_names import RunningCalls, operation_name
from synthquant.models.signature import Inputs

K = TypeVar("K")
V = TypeVar("V")

# Ways to bring branches together. Products are not among them: a gate (squeeze and excitation) ends no block.
_MERGES = frozenset(
    (
        *("add", "iadd", "radd", "sub", "isub", "rsub", "subtract", "addcmul", "lerp", "maximum", "minimum"),
        *("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack"),
    )
)


@dataclass(frozen=True)
class Value:
    """One state of one tensor: an in-place operation makes another value of it. Holds no data."""

    index: int
    """Number in order of appearance; two values are equal if this is."""
    shape: torch.Size = field(compare=False)
    from_input: bool = field(compare=False)
    """Whether it depends on the network's input (parameters, position embeddings and the like do not)."""
    is_floating_point: bool = field(compare=False)
    """Whether it holds floating-point numbers."""

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()


@dataclass(frozen=True)
class ModuleCall:
    """One call of one module."""

    index: int
    """Position among all calls, by the time they start; the root's is 0."""
    name: str
    """Module name, "" for the root; the first one if a module has several."""
    parent: int | None
    """Index of the call it was made in."""
    inputs: tuple[Value, ...]
    """Tensors among the arguments, those in lists, tuples and mappings too: positional first."""
    outputs: tuple[Value, ...]
    """Tensors among what was returned."""


@dataclass(frozen=True)
class Operation:
    """One call of a torch function that read a tensor and made or changed one."""

    name: str
    """Name of the function without underscores at the ends, for example `conv2d`, `add`, `iadd`."""
    call: int
    """Index of the innermost module call that was running."""
    owner: int | None
    """Index of the module call that it belongs to (`operation_names`); none in layers."""
    key: str
    """Its name and its number among the functions of that name in the owner's call, for example `add_0`."""
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    """What it returned, and the new values of what it changed in place."""

    @property
    def is_merge(self) -> bool:
        """Whether it adds or joins two or more different tensors that depend on the network's input."""
        return self.name in _MERGES and len({value.index for value in self.inputs if value.from_input}) > 1


@dataclass(frozen=True)
class Trace:
    """Everything seen in one forward pass."""

    module_calls: tuple[ModuleCall, ...]
    operations: tuple[Operation, ...]
    parameters: Mapping[str, Value]
    """The value of each parameter, under every name that it has."""
    counts: Mapping[str, Mapping[str, frozenset[int]]]
    """For each module that operations belong to, how often each function ran in a call of it."""

    @property
    def inputs(self) -> tuple[Value, ...]:
        """What the network was given, constants left out."""
        return tuple(value for value in self.module_calls[0].inputs if value.from_input)

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Names of all modules that were called, in the order of their first call."""
        return tuple(self._calls_by_name)

    def calls(self, name: str) -> tuple[ModuleCall, ...]:
        """All calls of a module, in order; empty if it was never called."""
        return tuple(self._calls_by_name.get(name, ()))

    def consumers(self, value: Value) -> tuple[Operation, ...]:
        """The operations that read a value; passing it through a module unchanged does not count."""
        return tuple(self._consumers.get(value.index, ()))

    def producer(self, value: Value) -> Operation | None:
        """The operation that made a value; none for inputs and parameters."""
        return self._producers.get(value.index)

    def enclosing(self, call: int) -> Iterator[ModuleCall]:
        """The call with this index and all those it was made in, from the inside out."""
        index: int | None = call
        while index is not None:
            yield self.module_calls[index]
            index = self.module_calls[index].parent

    @cached_property
    def _calls_by_name(self) -> dict[str, list[ModuleCall]]:
        return _grouped((call.name, call) for call in self.module_calls)

    @cached_property
    def _consumers(self) -> dict[int, list[Operation]]:
        reads = (({value.index for value in operation.inputs}, operation) for operation in self.operations)
        return _grouped((index, operation) for indices, operation in reads for index in sorted(indices))

    @cached_property
    def _producers(self) -> dict[int, Operation]:
        return {value.index: operation for operation in self.operations for value in operation.outputs}


def trace(module: nn.Module, example: Inputs | Tensor) -> Trace:
    """Run `module` once on a copy of `example` in eval mode without gradients, and watch.

    The module, its modes and its hooks are afterwards as before. What the forward pass raises is passed on.
    """
    tracer = _Tracer(module)
    parts = list(module.modules())
    with torch.inference_mode(False), torch.no_grad(), eval_mode(module):
        # A copy: networks may change their input in place. Tensors made in inference mode carry no version.
        inputs = Inputs.of(example).clone()
        for tensor in inputs.tensors:
            tracer.mark_input(tensor)
        before, after = ((part, tracer.before) for part in parts), ((part, tracer.after) for part in parts)
        with hooked(after, pre=before, with_kwargs=True), _Watch(tracer):
            inputs.call(module)
    return tracer.finish()


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))


class _Tracer:
    """Takes notes during the forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self._values: dict[tuple[int, int], Value] = {}
        # Kept alive, so that an identity is never given to a second tensor.
        self._tensors: dict[int, Tensor] = {}
        self._tainted_memory: set[int] = set()
        self._calls: list[ModuleCall] = []
        self._running = RunningCalls(module)
        self._numbers: list[tuple[str, Counter[str]]] = []
        self._operations: list[Operation] = []
        named = module.named_parameters(remove_duplicate=False)
        self._parameters = {name: self._value(parameter) for name, parameter in named}

    def mark_input(self, tensor: Tensor) -> None:
        """Note what the network is given."""
        self._value(tensor, from_input=True)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook."""
        around = self._running.innermost
        inputs = self._values_in((args, kwargs))
        call = self._running.start(module)
        self._calls.append(ModuleCall(call.index, call.name, None if around is None else around.index, inputs, ()))
        if call.numbering is not None:
            self._numbers.append((call.name, call.numbering.counts))

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        """Forward hook."""
        index = self._running.end(module).index
        self._calls[index] = dataclasses.replace(self._calls[index], outputs=self._values_in(output))

    def operation(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run a torch function and note what it read and made."""
        read = list(tensors_in((args, kwargs)))
        inputs = tuple(self._value(tensor) for tensor in read)
        name, owner, innermost = operation_name(function), self._running.owner, self._running.innermost
        key = self._running.take(name) or name
        result = function(*args, **kwargs)
        tainted = any(value.from_input for value in inputs)
        touched = [*tensors_in(result), *read]
        known = set(inputs)
        # A tensor that was read and has another version now was changed in place, whatever was returned.
        outputs = dict.fromkeys(value for tensor in touched if (value := self._value(tensor, tainted)) not in known)
        if outputs and inputs and innermost is not None:
            owned_by = None if owner is None else owner.index
            self._operations.append(Operation(name, innermost.index, owned_by, key, inputs, tuple(outputs)))
        return result

    def finish(self) -> Trace:
        """Everything noted, without the tensors."""
        self._tensors.clear()
        return Trace(tuple(self._calls), tuple(self._operations), self._parameters, self._counts())

    def _counts(self) -> dict[str, dict[str, frozenset[int]]]:
        return {
            name: {function: frozenset(count[function] for count in counts) for function in set().union(*counts)}
            for name, counts in _grouped(self._numbers).items()
        }

    def _values_in(self, content: object) -> tuple[Value, ...]:
        return tuple(self._value(tensor) for tensor in tensors_in(content))

    def _value(self, tensor: Tensor, from_input: bool = False) -> Value:
        key = (id(tensor), tensor._version)
        value = self._values.get(key)
        if value is None:
            # Memory that held data of the input makes a tensor depend on it too: it was written to through a view.
            memory = _memory(tensor)
            from_input = from_input or memory in self._tainted_memory
            if from_input and memory:
                self._tainted_memory.add(memory)
            value = Value(len(self._values), tensor.shape, from_input, tensor.is_floating_point())
            self._values[key] = value
            self._tensors[id(tensor)] = tensor
        return value


class _Watch(TorchFunctionMode):
    """Hands every torch function to the tracer; functions called inside one another are seen as one."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._tracer.operation(func, args, kwargs or {})


def _memory(tensor: Tensor) -> int:
    """Address of a tensor's memory; 0 where it has none of its own that could be shared."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    groups: dict[K, list[V]] = {}
    for key, item in pairs:
        groups.setdefault(key, []).append(item)
    return groups
