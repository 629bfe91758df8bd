"""Reconstruction units: which layers of a network belong together, found from the module tree and one forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from synthquant.models.operation_names import QUANTIZABLE
from synthquant.models.signature import Inputs
from synthquant.models.trace import Trace, trace

Granularity = Literal["block", "layer", "network"]

_NORMS = ("group_norm", "layer_norm", "instance_norm", "rms_norm")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """A module that is reconstructed as a whole."""

    name: str
    """Module name; "" is the whole network."""
    layers: tuple[str, ...]
    """Names of the layers in it, in execution order."""


def find_units(
    module: nn.Module,
    example: Inputs | Tensor,
    granularity: Granularity,
    layers: AbstractSet[str],
    seen: Trace | None = None,
) -> list[Unit]:
    """Split `layers` (names) into units, in execution order; each layer that is called lands in exactly one.

    With "block", a unit is a residual block or the like: the outermost module whose class joins data branches in its
    forward pass and is not made of several such modules itself (a stage), or a module of two or more layers that stands
    at the same place as one (a block without a shortcut). A module that joins nothing itself and holds one block, of a
    class of which others hold several, is a stage too. Layers outside blocks are units of their own. No class names
    matter. With "layer" each layer is a unit, with "network" the root is the only one.
    `seen` saves the forward pass of `example` if there is a trace of `module` already.
    """
    seen = seen or trace(module, example)
    ordered = [name for name in seen.order if name in layers]
    if granularity == "network":
        return [Unit("", tuple(ordered))] if ordered else []
    blocks = _Tree(module, seen, layers).blocks() if granularity == "block" else []
    position = {name: index for index, name in enumerate(seen.order)}
    free = dict.fromkeys(ordered)
    units = []
    for block in sorted(blocks, key=lambda name: position[name]):
        inside = [name for name in free if name.startswith(f"{block}.")]
        for name in inside:
            del free[name]
        if inside:
            units.append(Unit(block, tuple(inside)))
    units += [Unit(name, (name,)) for name in free]
    return sorted(units, key=lambda unit: position[unit.name])


def shared_inputs(seen: Trace, layers: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of two or more of the layers that read the very same tensor, in execution order.

    A layer that is called several times joins the groups of all its inputs.
    """
    group_of: dict[str, list[str]] = {name: [name] for name in seen.order if name in set(layers)}
    reader: dict[int, str] = {}
    for name in group_of:
        for call in seen.calls(name):
            first = reader.setdefault(call.inputs[0].index, name) if call.inputs else name
            if group_of[first] is not group_of[name]:
                group_of[first].extend(group_of[name])
                for member in group_of[name]:
                    group_of[member] = group_of[first]
    groups = {id(group): group for group in group_of.values() if len(group) > 1}
    position = {name: index for index, name in enumerate(group_of)}
    return [tuple(sorted(group, key=position.__getitem__)) for group in groups.values()]


def block_inputs(seen: Trace, units: Sequence[Unit], layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Units whose input is read both by layers and by something else in them, with the names of those layers.

    The input is the first positional tensor of the unit's first call; something else is an operation outside the
    layers: most often the addition at the end of an identity shortcut. There one quantizer can serve the whole unit. A
    normalisation is no such reader: where nothing else reads the input, as in blocks of denoisers, it stays as it is.
    """
    known = set(layers)
    found = {}
    for unit in units:
        calls = seen.calls(unit.name)
        if not calls or not calls[0].inputs or unit.name in known:
            continue
        value = calls[0].inputs[0]
        inside = {name for name in unit.layers if name in known}
        readers = tuple(
            name
            for name in unit.layers
            if name in inside and any(value in call.inputs[:1] for call in seen.calls(name))
        )
        others = []
        for operation in seen.consumers(value):
            names = [call.name for call in seen.enclosing(operation.call)]
            if unit.name in names and not inside.intersection(names) and operation.name not in _NORMS:
                others.append(operation)
        if readers and others:
            found[unit.name] = readers
    return found


class _Tree:
    """The module tree of a network together with what was seen in its forward pass."""

    def __init__(self, root: nn.Module, seen: Trace, layers: AbstractSet[str]) -> None:
        self._modules = dict(root.named_modules())
        self._seen = seen
        self._layers = {
            name
            for name in seen.order
            if name in layers or (isinstance(self._modules[name], QUANTIZABLE) and self._modules[name] is not root)
        }

    def blocks(self) -> list[str]:
        """Names of the modules that are blocks; none lies in another."""
        found = list(self._outermost("", self._is_block))
        places = {self._place(name) for name in found}

        def stands_beside_blocks(name: str) -> bool:
            return (
                self._place(name) in places
                and self._layers_in(name) > 1
                and self._could_be_block(name)
                and not any(block.startswith(f"{name}.") or name.startswith(f"{block}.") for block in found)
            )

        return found + [name for name in self._outermost("", stands_beside_blocks) if name not in found]

    def _is_block(self, name: str) -> bool:
        """Whether instances of its class join branches, and it is not a stage of such modules.

        A stage may happen to hold a single block; it is recognised by other instances of its class.
        """
        kind = type(self._modules[name])
        if not self._could_be_block(name) or kind not in self._joining_classes:
            return False
        if kind not in self._stage_classes:
            return True
        below = (type(self._modules[child]) for child in self._below(name) if self._layers_in(child))
        return name in self._joining and not any(child in self._joining_classes for child in below)

    def _could_be_block(self, name: str) -> bool:
        return (
            self._layers_in(name) > 0
            and bool(self._seen.calls(name))
            and not self._is_container(name)
            and name not in self._layers
            and name not in self._stages
            and name not in self._wrappers
        )

    def _outermost(self, name: str, wanted: Callable[[str], bool]) -> Iterator[str]:
        """Walk down from `name` and yield each first module that is wanted."""
        if wanted(name):
            yield name
            return
        for child in self._children[name]:
            yield from self._outermost(child, wanted)

    @cached_property
    def _children(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = {name: [] for name in self._modules}
        for name in self._modules:
            if name:
                children[name.rpartition(".")[0]].append(name)
        return children

    def _below(self, name: str) -> Iterator[str]:
        for child in self._children[name]:
            yield child
            yield from self._below(child)

    def _layers_in(self, name: str) -> int:
        """How many quantizable layers a module holds; a layer holds itself."""
        return self._layer_counts[name]

    @cached_property
    def _layer_counts(self) -> Counter[str]:
        return Counter(name for layer in self._layers for name in _with_ancestors(layer))

    def _is_container(self, name: str) -> bool:
        """Whether a module only holds others: a subclass of a container that has its own forward pass is more."""
        part = self._modules[name]
        if not isinstance(part, _CONTAINERS):
            return False
        return type(part).forward in (nn.Sequential.forward, nn.Module.forward)

    @cached_property
    def _joining(self) -> set[str]:
        """Modules in whose calls data branches are joined, outside quantizable layers."""
        found: set[str] = set()
        for operation in self._seen.operations:
            if operation.is_merge:
                names = {call.name for call in self._seen.enclosing(operation.call)}
                if not names & self._layers:
                    found |= names
        return found

    @cached_property
    def _joining_classes(self) -> set[type[nn.Module]]:
        return {type(self._modules[name]) for name in self._joining if not self._is_container(name)}

    @cached_property
    def _stages(self) -> set[str]:
        """Modules with two or more joining modules of one class right below (through containers), and all above.

        And those that join nothing themselves and hold, at any depth, a joining module of a class of which such
        modules hold two or more.
        """
        found: set[str] = set()
        repeated: set[type[nn.Module]] = set()
        for name in self._modules:
            kinds = Counter(
                type(self._modules[child])
                for child in self._right_below(name)
                if child in self._joining and self._layers_in(child)
            )
            if any(count > 1 for count in kinds.values()):
                found.update(_with_ancestors(name))
                repeated.update(kind for kind, count in kinds.items() if count > 1)
        for name in self._joining - self._joining_themselves:
            below = (child for child in self._below(name) if child in self._joining and self._layers_in(child))
            if not self._is_container(name) and any(type(self._modules[child]) in repeated for child in below):
                found.update(_with_ancestors(name))
        return found

    @cached_property
    def _joining_themselves(self) -> set[str]:
        """Modules that join data branches in their own forward."""
        owners = (operation.owner for operation in self._seen.operations if operation.is_merge)
        return {self._seen.module_calls[owner].name for owner in owners if owner is not None}

    @cached_property
    def _stage_classes(self) -> set[type[nn.Module]]:
        return {type(self._modules[name]) for name in self._stages if not self._is_container(name)}

    def _right_below(self, name: str) -> Iterator[str]:
        for child in self._children[name]:
            if self._is_container(child):
                yield from self._right_below(child)
            else:
                yield child

    @cached_property
    def _wrappers(self) -> list[str]:
        """The root, and what it wraps: modules that hold all layers, from the outside in."""
        chain = [""]
        while chain:
            holders = [child for child in self._children[chain[-1]] if self._layers_in(child)]
            if len(holders) != 1 or holders[0] in self._layers:
                break
            chain.append(holders[0])
        return chain

    def _place(self, name: str) -> tuple[str, int]:
        """Attribute of the network proper that a module lies under, and how deep it lies there."""
        network = next(
            wrapper for wrapper in reversed(self._wrappers) if wrapper == "" or not self._is_container(wrapper)
        )
        parts = name.removeprefix(f"{network}.").split(".") if network else name.split(".")
        return parts[0], len(parts)


def _with_ancestors(name: str) -> list[str]:
    """The names of a module and of all it lies in, the root "" last."""
    parts = name.split(".") if name else []
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
