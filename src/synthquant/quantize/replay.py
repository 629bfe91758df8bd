"""Running a network up to one unit without running the units before it.

The code between units (a pooling, a flatten, a sum) belongs to no module, and nothing is traced symbolically. So to
reach the input of a unit, the network's own forward runs once more with each earlier unit's forward replaced by a
look-up of what it returned, and stops where the unit begins. Earlier units whose output does not reach this one except
through other units return zeros.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import device_of, forwards_replaced, get_module
from synthquant.models.blocks import Unit
from synthquant.models.signature import Inputs, Leaves, Signature, TensorSpec, lookups

NETWORK_INPUT = -1
Origin = tuple[int, int]
"""An earlier unit, or `NETWORK_INPUT`, and which of the per-sample leaves that it gives."""
_AS_ONE = "set granularity=network, which learns the network as one unit"
_PLAIN = (int, float, complex, str, bytes, slice, range, enum.Enum, torch.dtype, torch.device, torch.Size)


class _Reached(BaseException):
    """The unit was reached; not an `Exception`, so that no handler in a user's forward swallows it."""


class Replay:
    """Knows, for each unit, what goes in, what comes out, and which earlier outputs its input is made of.

    Attributes:
        units: the units in execution order.
        inputs: arguments of each unit: `(args, kwargs)`.
        outputs: what each unit returns.
        sources: for each unit the indices of earlier units whose output its input is computed from without passing
            through another unit; `NETWORK_INPUT` stands for what the network is given.
    """

    def __init__(self, network: nn.Module, units: Sequence[Unit], example: Inputs | torch.Tensor) -> None:
        """Watch two small forward passes.

        Args:
            network: the network.
            units: its units in execution order.
            example: at least 3 samples.

        Raises:
            UnsupportedModelError: what passes between units cannot be cached for each sample.
        """
        self.network = network
        self.units = list(units)
        self._modules = [get_module(network, unit.name) for unit in units]
        self._example = example = Inputs.of(example)
        two, three = self._observe(example.rows(0, 2)), self._observe(example.rows(0, 3))
        names = [unit.name for unit in units]
        self.inputs = [_signature(name, a, b) for name, a, b in zip(names, two.inputs, three.inputs, strict=True)]
        self.outputs = [_signature(name, a, b) for name, a, b in zip(names, two.outputs, three.outputs, strict=True)]
        self.sources = three.sources
        self._output_sources = three.output_sources
        self._verify(example.rows(0, 3), three)

    def needed_after(self, index: int) -> set[int]:
        """Units up to `index` (and the network's inputs) whose output a later unit still reads."""
        later = self._output_sources.union(*self.sources[index + 1 :])
        return {source for source in later if source <= index}

    def run_to(
        self, index: int, count: int, inputs: Inputs | None, stored: Callable[[int], Leaves]
    ) -> tuple[Leaves, list[Origin | None]]:
        """Input of unit `index` for one batch.

        Args:
            index: the unit.
            count: samples in the batch.
            inputs: what the network is given; may be left out if the unit does not read it.
            stored: gives the per-sample output leaves of an earlier unit for this batch, as fresh tensors.

        Leaves have their samples in the first dimension, here as everywhere.

        Returns:
            The per-sample leaves of the unit's arguments, and for each whose leaf it is, untouched, or None.
        """
        given: dict[int, tuple[Origin, int]] = {}
        for number, tensor in enumerate([] if inputs is None else inputs.tensors):
            given[id(tensor)] = (NETWORK_INPUT, number), tensor._version
        caught: list[Leaves] = []

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(self.inputs[index].per_sample((args, kwargs)))
            raise _Reached

        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(self._replaced(index, count, self.sources[index], stored, given))
            handle = self._modules[index].register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            with suppress(_Reached):
                (self._nothing(count) if inputs is None else inputs).call(self.network)
        (leaves,) = caught
        origins: list[Origin | None] = []
        for leaf in leaves:
            origin, version = given.get(id(leaf), (None, 0))
            origins.append(origin if leaf._version == version else None)
        return leaves, origins

    def run_from(self, index: int, inputs: Inputs, stored: Callable[[int], Leaves]) -> Any:
        """What the network gives for a batch, with units before `index` looked up and the rest run.

        Gradients are recorded.
        """
        read = self.needed_after(index - 1)
        with self._replaced(index, len(inputs), read, stored, {}):
            return inputs.call(self.network)

    def run_behind(self, index: int, inputs: Inputs, output: Leaves, stored: Callable[[int], Leaves]) -> Any:
        """What the network gives for a batch, with `output` for that of unit `index`; earlier ones are looked up."""

        def known(unit: int) -> Leaves:
            return output if unit == index else stored(unit)

        with self._replaced(index + 1, len(inputs), self.needed_after(index), known, {}):
            return inputs.call(self.network)

    def run_unit(self, index: int, leaves: Leaves) -> Any:
        """What unit `index` returns for the per-sample leaves of its arguments."""
        args, kwargs = self.inputs[index].rebuild(leaves)
        with lookups([(f"{place} of {self.units[index].name!r}", leaf) for place, leaf in enumerate(leaves)]):
            return self._modules[index](*args, **kwargs)

    @contextmanager
    def _replaced(
        self,
        index: int,
        count: int,
        read: set[int],
        stored: Callable[[int], Leaves],
        given: dict[int, tuple[Origin, int]],
    ) -> Iterator[None]:
        """Let units before `index` return stored outputs, entered in `given`, or zeros if they are not in `read`."""
        place = device_of(self.network)

        def lookup(unit: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                gives = self.outputs[unit]
                leaves = stored(unit) if unit in read else [spec.zeros(count, place) for spec in gives.varying]
                for number, leaf in enumerate(leaves if unit in read else []):
                    given[id(leaf)] = (unit, number), leaf._version
                    kept.append(leaf)
                return gives.rebuild(leaves)

            return forward

        kept: Leaves = []  # keeps the tensors alive, so that an id stays unique
        with forwards_replaced((module, lookup(unit)) for unit, module in enumerate(self._modules[:index])):
            yield

    def _verify(self, inputs: Inputs, seen: _Observation) -> None:
        """Reach every unit once and compare; one that reads something else takes all earlier outputs as sources.

        That is the case where the way from one unit to the next has no gradient: whole numbers, a rounding, a detach.
        """

        def stored(unit: int) -> Leaves:
            return [leaf.clone() for leaf in self.outputs[unit].per_sample(seen.outputs[unit])]

        def reached(index: int) -> bool:
            given = inputs.clone() if NETWORK_INPUT in self.sources[index] else None
            leaves, _ = self.run_to(index, len(inputs), given, stored)
            wanted = self.inputs[index].per_sample(seen.inputs[index])
            return all(_close(leaf, other) for leaf, other in zip(leaves, wanted, strict=True))

        for index, unit in enumerate(self.units):
            if not reached(index):
                self.sources[index] = {NETWORK_INPUT, *range(index)}
                if not reached(index):
                    raise UnsupportedModelError(
                        f"module {unit.name!r} does not read the same twice for the same samples and cannot be"
                        " reconstructed; is something in the network random?"
                    )

    def _nothing(self, count: int) -> Inputs:
        """Zeros in place of samples."""
        place = device_of(self.network)
        return self._example.filled([spec.zeros(count, place) for spec in self._example.signature.varying])

    def _observe(self, inputs: Inputs) -> _Observation:
        """One forward pass in which every unit's output starts a new autograd graph.

        The graph behind a unit's arguments then ends in exactly those outputs that reach it.
        """
        seen = _Observation([None] * len(self.units), [None] * len(self.units), [set() for _ in self.units], set())
        starts: dict[int, tuple[int, torch.Tensor]] = {}

        def start(tensor: Any, source: int) -> Any:
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                return tensor
            leaf = tensor.detach().requires_grad_()
            starts[id(leaf)] = (source, leaf)
            # A copy, because code between units may work in place, which autograd forbids on a leaf.
            return leaf.clone()

        def sources_of(value: Any) -> set[int]:
            tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            return {starts[key][0] for tensor in tensors for key in _graph_leaves(tensor) if key in starts}

        def before(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                if seen.inputs[index] is not None:
                    raise UnsupportedModelError(
                        f"module {self.units[index].name!r} runs more than once in a forward pass and cannot be"
                        f" reconstructed by itself; {_AS_ONE}, or put it on the scheme's ignore list"
                    )
                seen.inputs[index] = pytree.tree_map(_detached, (args, kwargs))
                seen.sources[index] |= sources_of((args, kwargs))

            return hook

        def after(index: int) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                seen.outputs[index] = pytree.tree_map(_detached, output)
                return pytree.tree_map(lambda leaf: start(leaf, index), output)

            return hook

        with ExitStack() as stack, torch.enable_grad():
            for index, module in enumerate(self._modules):
                handle = module.register_forward_pre_hook(before(index), with_kwargs=True, prepend=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(after(index)).remove)
            given = inputs.clone()
            output = given.filled([start(tensor, NETWORK_INPUT) for tensor in given.tensors]).call(self.network)
            seen.output_sources |= sources_of(output)
        return seen


@dataclass
class _Observation:
    inputs: list[Any]
    outputs: list[Any]
    sources: list[set[int]]
    output_sources: set[int]


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _graph_leaves(tensor: torch.Tensor) -> set[int]:
    """Ids of the leaf tensors from which `tensor` was computed."""
    found: set[int] = set()
    visited: set[Any] = set()
    stack: list[Any] = [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack.extend(function for function, _ in node.next_functions)
    return found


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    # Gradients were recorded the first time, which may choose other kernels.
    size = float(other.abs().amax()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * size, equal_nan=True)


def _signature(unit: str, two: Any, three: Any) -> Signature:
    """What a value is, from what it was for two and for three samples."""
    leaves, tree = pytree.tree_flatten(two)
    others, other_tree = pytree.tree_flatten(three)
    if tree != other_tree:
        raise UnsupportedModelError(
            f"module {unit!r} takes or returns another structure for each size of the batch; {_AS_ONE}"
        )
    specs = [_spec(unit, leaf, other) for leaf, other in zip(leaves, others, strict=True)]
    constants = [None if spec.per_sample or spec.per_count else leaf for leaf, spec in zip(leaves, specs, strict=True)]
    return Signature(tree, tuple(specs), tuple(constants))


def _spec(unit: str, two: Any, three: Any) -> TensorSpec:
    if not isinstance(two, torch.Tensor):
        return _plain_spec(unit, two, three)
    if two.shape == three.shape:
        if not _close(two, three):
            raise UnsupportedModelError(
                f"module {unit!r} takes or returns a tensor {list(two.shape)} that depends on the samples but has no"
                f" row for each of them, and cannot be cached; {_AS_ONE}"
            )
        return TensorSpec(0)
    grown = [dim for dim, (one, other) in enumerate(zip(two.shape, three.shape, strict=False)) if one != other]
    alone = two.ndim == three.ndim and len(grown) == 1
    rows, rest = divmod(two.shape[grown[0]], 2) if alone else (0, 0)
    if not alone or rest or three.shape[grown[0]] != 3 * rows:
        raise UnsupportedModelError(
            f"module {unit!r} takes or returns a tensor that grows from {list(two.shape)} to {list(three.shape)} when"
            f" the batch grows from 2 to 3; only tensors with the samples in one dimension can be cached: {_AS_ONE}"
        )
    (dim,) = grown
    return TensorSpec(rows, (*two.shape[:dim], *two.shape[dim + 1 :]), two.dtype, dim=dim)


def _plain_spec(unit: str, two: Any, three: Any) -> TensorSpec:
    """What a leaf that is no tensor is: the same for every batch, or the size of the batch."""
    if two is three or (isinstance(two, _PLAIN) and type(two) is type(three) and two == three):
        return TensorSpec(0)
    if type(two) is int and type(three) is int and two % 2 == 0 and two * 3 == three * 2:
        return TensorSpec(0, per_count=two // 2)
    raise UnsupportedModelError(
        f"module {unit!r} takes or returns a {type(two).__name__} that changes with the batch and cannot be cached;"
        f" {_AS_ONE}, or put the module's layers on the scheme's ignore list"
    )
