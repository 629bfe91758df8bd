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
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import forwards_replaced, get_module
from synthquant.models.blocks import Unit

Leaves = list[Any]
NETWORK_INPUT = -1
_AS_ONE = "set granularity=network, which learns the network as one unit"
_PLAIN = (int, float, complex, str, bytes, slice, range, enum.Enum, torch.dtype, torch.device, torch.Size)


class _Reached(BaseException):
    """The unit was reached; not an `Exception`, so that no handler in a user's forward swallows it."""


@dataclass(frozen=True)
class LeafKind:
    """What a value passed between units is.

    Attributes:
        per_image: rows per image if it is a tensor with one or more rows for each image, else 0.
        per_count: its value for one image if it is a whole number that grows with the batch, else 0.
        shape: shape after the first dimension, if it is such a tensor.
        dtype: its dtype, if it is such a tensor.
    """

    per_image: int
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    per_count: int = 0

    def rows(self, count: int) -> tuple[int, ...]:
        """Shape of a cache of this leaf for `count` images, one image a row."""
        return (count, *self.shape) if self.per_image == 1 else (count, self.per_image, *self.shape)

    def to_rows(self, leaf: torch.Tensor) -> torch.Tensor:
        """A leaf as rows of one image."""
        return leaf if self.per_image == 1 else leaf.reshape(-1, self.per_image, *self.shape)

    def from_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_rows`."""
        return rows if self.per_image == 1 else rows.flatten(0, 1)


@dataclass(frozen=True)
class Port:
    """The arguments or the output of a unit, as a flat list of leaves.

    Attributes:
        spec: how the leaves make up the value.
        kinds: what each leaf is.
        constants: the leaves that do not depend on the images, None elsewhere.
    """

    spec: pytree.TreeSpec
    kinds: tuple[LeafKind, ...]
    constants: tuple[Any, ...]

    def rebuild(self, leaves: Leaves) -> Any:
        """The value made of per-image leaves (in order) and the constants."""
        rest = iter(leaves)
        count = len(leaves[0]) // self.varying[0].per_image if leaves else 0
        full = [
            next(rest) if kind.per_image else kind.per_count * count if kind.per_count else constant
            for kind, constant in zip(self.kinds, self.constants, strict=True)
        ]
        return pytree.tree_unflatten(full, self.spec)

    def per_image(self, value: Any) -> Leaves:
        """The leaves of `value` that have rows for each image."""
        leaves = pytree.tree_leaves(value)
        return [leaf for leaf, kind in zip(leaves, self.kinds, strict=True) if kind.per_image]

    @property
    def main(self) -> int:
        """Which of the varying leaves is the first that holds floating-point numbers."""
        return next(index for index, kind in enumerate(self.varying) if kind.dtype.is_floating_point)

    def first(self, rows: torch.Tensor) -> torch.Tensor:
        """The main leaf from rows of one image."""
        return self.varying[self.main].from_rows(rows)

    def leaf(self, varying: int) -> int:
        """Which of all leaves a varying one is."""
        return [index for index, kind in enumerate(self.kinds) if kind.per_image][varying]

    @property
    def varying(self) -> tuple[LeafKind, ...]:
        """Kinds of the leaves with rows for each image."""
        return tuple(kind for kind in self.kinds if kind.per_image)


class Replay:
    """Knows, for each unit, what goes in, what comes out, and which earlier outputs its input is made of.

    Attributes:
        units: the units in execution order.
        inputs: arguments of each unit: `(args, kwargs)`.
        outputs: what each unit returns.
        sources: for each unit the indices of earlier units whose output its input is computed from without passing
            through another unit; `NETWORK_INPUT` stands for the images.
    """

    def __init__(self, network: nn.Module, units: Sequence[Unit], example: torch.Tensor) -> None:
        """Watch two small forward passes.

        Args:
            network: the network.
            units: its units in execution order.
            example: normalised images, at least 3.

        Raises:
            UnsupportedModelError: what passes between units cannot be cached for each image.
        """
        self.network = network
        self.units = list(units)
        self._modules = [get_module(network, unit.name) for unit in units]
        self._images = LeafKind(1, tuple(example.shape[1:]), example.dtype)
        two, three = self._observe(example[:2]), self._observe(example[:3])
        names = [unit.name for unit in units]
        self.inputs = [_port(name, a, b) for name, a, b in zip(names, two.inputs, three.inputs, strict=True)]
        self.outputs = [_port(name, a, b) for name, a, b in zip(names, two.outputs, three.outputs, strict=True)]
        self.sources = three.sources
        self._output_sources = three.output_sources
        self._verify(example[:3], three)

    def needed_after(self, index: int) -> set[int]:
        """Units up to `index` (and the images) whose output a later unit still reads."""
        later = self._output_sources.union(*self.sources[index + 1 :])
        return {source for source in later if source <= index}

    def run_to(
        self, index: int, count: int, images: torch.Tensor | None, stored: Callable[[int], Leaves]
    ) -> tuple[Leaves, list[int | None]]:
        """Input of unit `index` for one batch.

        Args:
            index: the unit.
            count: images in the batch.
            images: the batch, `[count, 3, H, W]`; may be left out if the unit does not read it.
            stored: gives the per-image output leaves of an earlier unit for this batch, as fresh tensors.

        Returns:
            The per-image leaves of the unit's arguments, and for each the earlier unit of which it is the first
            output leaf itself, untouched, or None.
        """
        given: dict[int, tuple[int, int]] = {}
        caught: list[Leaves] = []

        def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append(self.inputs[index].per_image((args, kwargs)))
            raise _Reached

        with ExitStack() as stack, torch.no_grad():
            stack.enter_context(self._replaced(index, count, self.sources[index], stored, given))
            handle = self._modules[index].register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
            with suppress(_Reached):
                self.network(self._zeros(self._images, count) if images is None else images)
        (leaves,) = caught
        origins: list[int | None] = []
        for leaf in leaves:
            source, version = given.get(id(leaf), (None, 0))
            origins.append(source if source is not None and leaf._version == version else None)
        return leaves, origins

    def run_from(self, index: int, images: torch.Tensor, stored: Callable[[int], Leaves]) -> torch.Tensor:
        """Logits of one batch, with units before `index` looked up and the rest run; gradients are recorded."""
        read = self.needed_after(index - 1)
        with self._replaced(index, len(images), read, stored, {}):
            logits: torch.Tensor = self.network(images)
        return logits

    def run_behind(
        self, index: int, images: torch.Tensor, output: Leaves, stored: Callable[[int], Leaves]
    ) -> torch.Tensor:
        """Logits of one batch, with `output` for what unit `index` puts out and earlier units looked up."""

        def known(unit: int) -> Leaves:
            return output if unit == index else stored(unit)

        with self._replaced(index + 1, len(images), self.needed_after(index), known, {}):
            logits: torch.Tensor = self.network(images)
        return logits

    def run_unit(self, index: int, leaves: Leaves) -> Any:
        """What unit `index` returns for the per-image leaves of its arguments."""
        args, kwargs = self.inputs[index].rebuild(leaves)
        return self._modules[index](*args, **kwargs)

    @contextmanager
    def _replaced(
        self, index: int, count: int, read: set[int], stored: Callable[[int], Leaves], given: dict[int, tuple[int, int]]
    ) -> Iterator[None]:
        """Let units before `index` return stored outputs, or zeros if they are not in `read`."""

        def lookup(unit: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                port = self.outputs[unit]
                leaves = stored(unit) if unit in read else [self._zeros(kind, count) for kind in port.varying]
                if len(leaves) == 1 and unit in read:
                    given[id(leaves[0])] = (unit, leaves[0]._version)
                    kept.append(leaves[0])
                return port.rebuild(leaves)

            return forward

        kept: Leaves = []  # keeps the tensors alive, so that an id stays unique
        with forwards_replaced((module, lookup(unit)) for unit, module in enumerate(self._modules[:index])):
            yield

    def _verify(self, images: torch.Tensor, seen: _Observation) -> None:
        """Reach every unit once and compare; one that reads something else takes all earlier outputs as sources.

        That is the case where the way from one unit to the next has no gradient: a comparison, a rounding, a detach.
        """

        def stored(unit: int) -> Leaves:
            return [leaf.clone() for leaf in self.outputs[unit].per_image(seen.outputs[unit])]

        def reached(index: int) -> bool:
            leaves, _ = self.run_to(index, len(images), images.clone(), stored)
            wanted = self.inputs[index].per_image(seen.inputs[index])
            return all(_close(leaf, other) for leaf, other in zip(leaves, wanted, strict=True))

        for index, unit in enumerate(self.units):
            if not reached(index):
                self.sources[index] = {NETWORK_INPUT, *range(index)}
                if not reached(index):
                    raise UnsupportedModelError(
                        f"module {unit.name!r} does not read the same twice for the same images and cannot be"
                        " reconstructed; is something in the network random?"
                    )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(tensor.device for tensor in chain(self.network.parameters(), self.network.buffers()))

    def _zeros(self, kind: LeafKind, count: int) -> torch.Tensor:
        return torch.zeros(kind.per_image * count, *kind.shape, dtype=kind.dtype, device=self.device)

    def _observe(self, images: torch.Tensor) -> _Observation:
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
            logits = self.network(start(images, NETWORK_INPUT))
            seen.output_sources |= sources_of(logits)
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


def _port(unit: str, two: Any, three: Any) -> Port:
    """What a value is, from what it was for two and for three images."""
    leaves, spec = pytree.tree_flatten(two)
    others, other_spec = pytree.tree_flatten(three)
    if spec != other_spec:
        raise UnsupportedModelError(
            f"module {unit!r} takes or returns another structure for each size of the batch; {_AS_ONE}"
        )
    kinds = [_kind(unit, leaf, other) for leaf, other in zip(leaves, others, strict=True)]
    constants = [None if kind.per_image or kind.per_count else leaf for leaf, kind in zip(leaves, kinds, strict=True)]
    return Port(spec, tuple(kinds), tuple(constants))


def _kind(unit: str, two: Any, three: Any) -> LeafKind:
    if not isinstance(two, torch.Tensor):
        return _plain_kind(unit, two, three)
    if two.shape == three.shape:
        if not _close(two, three):
            raise UnsupportedModelError(
                f"module {unit!r} takes or returns a tensor {list(two.shape)} that depends on the images but has no row"
                f" for each of them, and cannot be cached; {_AS_ONE}"
            )
        return LeafKind(0)
    rows, rest = divmod(two.shape[0], 2)
    if rest or three.shape[0] != 3 * rows or two.shape[1:] != three.shape[1:]:
        raise UnsupportedModelError(
            f"module {unit!r} takes or returns a tensor that grows from {list(two.shape)} to {list(three.shape)} when"
            " the batch grows from 2 to 3; only tensors with the images in their first dimension can be cached:"
            f" {_AS_ONE}"
        )
    return LeafKind(rows, tuple(two.shape[1:]), two.dtype)


def _plain_kind(unit: str, two: Any, three: Any) -> LeafKind:
    """What a leaf that is no tensor is: the same for every batch, or the size of the batch."""
    if two is three or (isinstance(two, _PLAIN) and type(two) is type(three) and two == three):
        return LeafKind(0)
    if type(two) is int and type(three) is int and two % 2 == 0 and two * 3 == three * 2:
        return LeafKind(0, per_count=two // 2)
    raise UnsupportedModelError(
        f"module {unit!r} takes or returns a {type(two).__name__} that changes with the batch and cannot be cached;"
        f" {_AS_ONE}, or put the module's layers on the scheme's ignore list"
    )
