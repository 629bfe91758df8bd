"""Whether quantizers that stand where tensors are made reach everything that reads these tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import forwards_replaced
from synthquant.models.signature import Inputs
from synthquant.models.trace import Value, trace
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.moves import is_move
from synthquant.nn.placement import Flow, Place, Placement

_ROOT = "module"


def check_placement(
    network: nn.Module,
    placement: Placement,
    quantizers: Mapping[str, ActivationQuantizer],
    others: Sequence[ActivationQuantizer],
    example: Inputs,
) -> None:
    """Run the network with its quantizers once more and compare, reader by reader, where what is read comes from.

    Args:
        network: the network with its quantizers.
        placement: where quantizers should be.
        quantizers: those that stand where tensors are made, by name.
        others: those that stand where layers read.
        example: some samples.

    Raises:
        UnsupportedModelError: something still reads a tensor that is to be quantized as it was before, or other
            operations run each time.
    """
    holder = _Holder(network, [*quantizers.values(), *others])
    names = {id(part): name for name, part in holder.named_modules()}
    inside = {names[id(quantizer)]: name for name, quantizer in quantizers.items()}
    before = placement.flow
    # They copy, so that what they give can be told from what they take.
    copying = [(quantizer, torch.clone) for quantizer in (*quantizers.values(), *others)]
    with forwards_replaced(copying):
        seen = trace(holder, example)
    splits = [_inside(name) for name in before.pieces.splits]
    after = Flow(seen, (*(_inside(name) for name in before.layers), *inside), splits)
    for reader, wanted, found in _pairs(before, after):
        tensor = placement.tensor(wanted)
        if tensor is None or tensor.place is None:
            continue
        place = after.place(after.source(found))
        if place is None or inside.get(place.module) != tensor.place.name:
            raise UnsupportedModelError(
                f"{reader} reads {tensor.place.name} without its quantizer: the network changes a tensor in place and"
                " goes on under its old name; write x = f(x) there, or leave deploy at 'papers'"
            )


class _Holder(nn.Module):
    """Calls the network; quantizers of operations, which are no children of a module in it, are seen to run as well."""

    def __init__(self, network: nn.Module, quantizers: Sequence[ActivationQuantizer]) -> None:
        super().__init__()
        self.module = network
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _pairs(before: Flow, after: Flow) -> Iterator[tuple[str, Value, Value]]:
    """Everything that reads a tensor: its name, what it read without quantizers, and what it reads with them."""
    firsts = [operation for operation in before.operations if not is_move(operation)]
    seconds = [operation for operation in after.operations if not is_move(operation)]
    if [operation.name for operation in firsts] != [operation.name for operation in seconds]:
        raise UnsupportedModelError(
            "the network runs other operations each time, so that deploy 'full' cannot tell them apart; leave deploy at"
            " 'papers'"
        )
    for first, second in zip(firsts, seconds, strict=True):
        for wanted, found in zip(first.inputs, second.inputs, strict=True):
            place = before.place(first.outputs[0])
            yield _where(first.name, place), wanted, found
    for name in before.layers:
        for one, other in zip(before.seen.calls(name), after.seen.calls(_inside(name)), strict=True):
            yield f"layer {name!r}", one.inputs[0], other.inputs[0]


def _where(operation: str, place: Place | None) -> str:
    if place is None or not place.operation:
        return operation
    owner = f"forward of module {place.module!r}" if place.module else "network's own forward"
    return f"{place.operation} in the {owner}"


def _inside(name: str) -> str:
    return f"{_ROOT}.{name}" if name else _ROOT
