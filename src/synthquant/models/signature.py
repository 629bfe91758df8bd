"""What a network, or a part of it, takes and gives: trees of tensors with rows for each sample, and constants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from synthquant.core.errors import DataError, UnsupportedModelError

Leaves = list[Any]


@dataclass(frozen=True)
class TensorSpec:
    """What one leaf of such a tree is.

    Attributes:
        per_sample: rows per sample if it is a tensor with one or more rows for each sample, else 0.
        per_count: its value for one sample if it is a whole number that grows with the batch, else 0.
        shape: shape without the dimension of the samples, if it is such a tensor.
        dtype: its dtype, if it is such a tensor.
        dim: the dimension of the samples, if it is such a tensor: 1 in `[L, B, C]`.
    """

    per_sample: int
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    per_count: int = 0
    dim: int = 0

    def samples_first(self, leaf: Tensor) -> Tensor:
        """A leaf with its samples in the first dimension; memory is shared."""
        return leaf.movedim(self.dim, 0) if self.dim else leaf

    def in_place(self, leaf: Tensor) -> Tensor:
        """The inverse of `samples_first`."""
        return leaf.movedim(0, self.dim).contiguous() if self.dim else leaf  # views of it may be asked for

    def rows(self, count: int) -> tuple[int, ...]:
        """Shape of a cache of this leaf for `count` samples, one sample a row."""
        return (count, *self.shape) if self.per_sample == 1 else (count, self.per_sample, *self.shape)

    def to_rows(self, leaf: Tensor) -> Tensor:
        """A leaf as rows of one sample."""
        return leaf if self.per_sample == 1 else leaf.reshape(-1, self.per_sample, *self.shape)

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of `to_rows`."""
        return rows if self.per_sample == 1 else rows.flatten(0, 1)

    def zeros(self, count: int, device: torch.device) -> Tensor:
        """The leaf for `count` samples, these first, filled with zeros."""
        return torch.zeros(self.per_sample * count, *self.shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Signature:
    """The arguments or the output of a module, as a flat list of leaves.

    Leaves that are taken out of a value have their samples in the first dimension, wherever these are in the value.

    Attributes:
        tree: how the leaves make up the value.
        specs: what each leaf is.
        constants: the leaves that do not depend on the samples, None elsewhere.
    """

    tree: pytree.TreeSpec
    specs: tuple[TensorSpec, ...]
    constants: tuple[Any, ...]

    def rebuild(self, leaves: Leaves) -> Any:
        """The value made of per-sample leaves (in order) and the constants."""
        rest = iter(leaves)
        count = len(leaves[0]) // self.varying[0].per_sample if leaves else 0
        full = [
            spec.in_place(next(rest)) if spec.per_sample else spec.per_count * count if spec.per_count else constant
            for spec, constant in zip(self.specs, self.constants, strict=True)
        ]
        return pytree.tree_unflatten(full, self.tree)

    def per_sample(self, value: Any) -> Leaves:
        """The leaves of `value` that have rows for each sample."""
        leaves = pytree.tree_leaves(value)
        return [spec.samples_first(leaf) for leaf, spec in zip(leaves, self.specs, strict=True) if spec.per_sample]

    @property
    def main(self) -> int:
        """Which of the varying leaves is the first that holds floating-point numbers."""
        return next(index for index, spec in enumerate(self.varying) if spec.dtype.is_floating_point)

    def first(self, rows: Tensor) -> Tensor:
        """The main leaf from rows of one sample."""
        return self.varying[self.main].from_rows(rows)

    def leaf(self, varying: int) -> int:
        """Which of all leaves a varying one is."""
        return [index for index, spec in enumerate(self.specs) if spec.per_sample][varying]

    @property
    def varying(self) -> tuple[TensorSpec, ...]:
        """Specs of the leaves with rows for each sample."""
        return tuple(spec for spec in self.specs if spec.per_sample)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The arguments of one call of a network, for a batch of samples.

    Every tensor in them has the samples in its first dimension, but for those of arguments that are named constant;
    what is no tensor is constant too. Arguments may be trees of tensors.
    """

    args: tuple[Any, ...] = ()
    """Positional arguments."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments."""
    constants: AbstractSet[int | str] = frozenset()
    """Positions and keywords of arguments that are the same for every sample."""

    def __post_init__(self) -> None:
        """Raise `DataError` unless all tensors that vary have the same number of samples, and there is one."""
        unknown = [name for name in self.constants if name not in self.kwargs and name not in range(len(self.args))]
        if unknown:
            raise DataError(f"inputs name {unknown[0]!r} constant, which is none of their arguments")
        sizes = {name: len(leaf) if leaf.ndim else None for name, leaf in self.named()}
        first = next(iter(sizes), None)
        if first is None:
            raise DataError("inputs have no tensor that varies with the samples")
        for name, size in sizes.items():
            if size is None:
                raise DataError(f"input {name} has no dimension for the samples; name it constant if it is")
            if size != sizes[first]:
                raise DataError(
                    f"input {name} has {size} samples and input {first} {sizes[first]}; name one constant if it is"
                )

    @classmethod
    def of(cls, value: Inputs | Tensor) -> Inputs:
        """Return the inputs of a network that takes one tensor, `[B, ...]`; inputs as they are."""
        return value if isinstance(value, Inputs) else cls((value,))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.tensors[0])

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that vary, in order."""
        return [self._leaves[index] for index in self._varying]

    def named(self) -> list[tuple[str, Tensor]]:
        """The same with names: position or keyword, and the way to it in a tree, for example `0` or `cond.text`."""
        return [(self._paths[index], self._leaves[index]) for index in self._varying]

    def require(self, signature: Signature) -> None:
        """Raise `DataError` unless these are inputs of a network of that signature; the number of samples is free.

        Constants must have its values: the network is calibrated, cached and exported with them.
        """
        mine = self.signature
        if mine.tree != signature.tree:
            names = ", ".join(name for name, _ in self.named())
            raise DataError(
                f"a sample has other arguments ({names}) than the network's example; give the same ones, in the same"
                " order"
            )
        values = zip(self._paths, mine.specs, signature.specs, mine.constants, signature.constants, strict=True)
        for name, found, wanted, constant, known in values:
            if found != wanted:
                raise DataError(
                    f"input {name} of a sample is {_described(found)}, and the network takes {_described(wanted)}"
                )
            if not found.per_sample and not _same(constant, known):
                raise DataError(
                    f"input {name} of a sample is constant and has another value than in the network's example; give"
                    " the example's, or do not name it constant"
                )

    def call(self, module: Callable[..., Any]) -> Any:
        """Return what a network gives for these arguments; raises as `lookups`."""
        with lookups(self.named()):
            return module(*self.args, **self.kwargs)

    def filled(self, tensors: Sequence[Tensor]) -> Inputs:
        """The same with other tensors in place of those that vary."""
        args, kwargs = self.arguments(tensors)
        return replace(self, args=args, kwargs=kwargs)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments with other tensors in place of those that vary, whatever their sizes."""
        leaves = list(self._leaves)
        for index, tensor in zip(self._varying, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return args, kwargs

    def rows(self, start: int, stop: int) -> Inputs:
        """The samples from `start` to `stop` (exclusive); memory is shared."""
        return self.filled([tensor[start:stop] for tensor in self.tensors])

    def cycled(self, count: int) -> Inputs:
        """`count` samples: these, again and again."""
        index = torch.arange(count, device=self.tensors[0].device) % len(self)
        return self.filled([tensor[index.to(tensor.device)] for tensor in self.tensors])

    def clone(self) -> Inputs:
        """A copy of all tensors: networks may change what they are given."""
        return self._mapped(torch.clone)

    def to(self, device: torch.device) -> Inputs:
        """The same with all tensors, constant ones too, on a device."""
        return self._mapped(lambda tensor: tensor.to(device))

    @property
    def finite(self) -> bool:
        """Whether all that varies is finite."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors)

    @cached_property
    def signature(self) -> Signature:
        """What a network takes that takes these, whatever their number."""
        specs, constants = [TensorSpec(0)] * len(self._leaves), list(self._leaves)
        for index in self._varying:
            leaf = self._leaves[index]
            specs[index], constants[index] = TensorSpec(1, tuple(leaf.shape[1:]), leaf.dtype), None
        return Signature(self._tree, tuple(specs), tuple(constants))

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        leaves = [function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._tree)
        return replace(self, args=args, kwargs=kwargs)

    @cached_property
    def _flat(self) -> tuple[list[tuple[Any, Any]], pytree.TreeSpec]:
        flat, tree = pytree.tree_flatten_with_path((self.args, dict(self.kwargs)))
        return list(flat), tree

    @property
    def _tree(self) -> pytree.TreeSpec:
        return self._flat[1]

    @cached_property
    def _leaves(self) -> Leaves:
        return [leaf for _, leaf in self._flat[0]]

    @cached_property
    def _paths(self) -> list[str]:
        return [path_name(path[1:]) for path, _ in self._flat[0]]

    @cached_property
    def _varying(self) -> list[int]:
        """Positions of the tensors that vary among the leaves."""
        return [
            index
            for index, (path, leaf) in enumerate(self._flat[0])
            if isinstance(leaf, Tensor) and _key(path[1]) not in self.constants
        ]


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}" if spec.per_sample else "constant"


def _same(first: Any, second: Any) -> bool:
    """Whether two constants are equal; values that are not numbers equal each other."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        first, second = first.detach().cpu(), second.detach().cpu()
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        return bool(((first == second) | ((first != first) & (second != second))).all())
    return first is second or (type(first) is type(second) and bool(first == second))


@contextmanager
def lookups(given: Sequence[tuple[str, Tensor]]) -> Iterator[None]:
    """Say which of a module's inputs hold whole numbers, where one of them is no index of a table in it.

    Raises `DataError` in place of `IndexError`, which passes if there are no such inputs. A GPU has no such error.
    """
    try:
        yield
    except IndexError as error:
        whole = [(name, t) for name, t in given if not t.is_floating_point() and t.dtype != torch.bool and t.numel()]
        if not whole:
            raise
        ranges = ", ".join(f"input {name} runs from {int(t.min())} to {int(t.max())}" for name, t in whole)
        raise DataError(f"the network has no entry for one of its whole numbers ({error}): {ranges}") from error


def joined(parts: Sequence[Inputs]) -> Inputs:
    """Return the samples of several inputs of one signature, of which there is at least one, as one batch."""
    return parts[0].filled([torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True)])


def path_name(path: Sequence[Any]) -> str:
    """The way to a leaf of a tree as text, for example `boxes.0`; empty for a tree that is one leaf."""
    return ".".join(str(_key(entry)) for entry in path)


def _key(entry: Any) -> Any:
    """Index, key or attribute of one step on the way to a leaf."""
    for kind in ("idx", "key", "name"):
        if hasattr(entry, kind):
            return getattr(entry, kind)
    return str(entry)


def named_outputs(value: Any) -> dict[str, Tensor]:
    """The floating-point tensors of what a network gave, by their way in the tree; the name of a lone one is empty.

    Raises `UnsupportedModelError` if there is none.
    """
    flat, _ = pytree.tree_flatten_with_path(value)
    found = {path_name(path): leaf for path, leaf in flat if isinstance(leaf, Tensor) and leaf.is_floating_point()}
    if not found:
        raise UnsupportedModelError(
            f"the network returns a {type(value).__name__} in which no floating-point tensor is found; it must return a"
            " tensor, or tensors in lists, tuples, dictionaries or classes that are registered with torch.utils._pytree"
        )
    return found


def channel_dim(output: Tensor) -> int | None:
    """Where the channels of an output with its samples first are; none if it has no such dimension.

    In the second dimension; of three dimensions (boxes, tokens) in the smaller of the last two.
    """
    if output.ndim < 2:
        return None
    return 2 if output.ndim == 3 and output.shape[2] < output.shape[1] else 1


def output_channels(output: Tensor) -> list[int]:
    """Where its channels may be: of five dimensions and more (anchors, volumes) in the last one as well."""
    dim = channel_dim(output)
    found = [] if dim is None else [dim]
    return [*found, output.ndim - 1] if output.ndim > 4 else found
