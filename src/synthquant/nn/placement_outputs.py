"""Which tensors leave the network: those that it returns, and those that reach them only side by side with others."""

from __future__ import annotations

from synthquant.models.trace import Operation, Value
from synthquant.nn.moves import JOINS
from synthquant.nn.placement import Flow, Placement


def output_quantizers(placement: Placement) -> list[str]:
    """Return the names of the quantizers of tensors that no layer reads and that leave the network, in order.

    They are returned, or joined to others that are, through any views; nothing is computed of them.
    """
    flow = placement.flow
    made = [value for operation in flow.operations for value in operation.outputs]
    made += [value for name in flow.layers for call in flow.seen.calls(name) for value in call.outputs]
    found: dict[str, None] = {}
    for value in sorted(made, key=lambda value: value.index):
        tensor = placement.tensor(value) if flow.source(value) == value else None
        if tensor is not None and tensor.place is not None and not tensor.layers and _leaves(flow, value):
            found[tensor.place.name] = None
    return list(found)


def _leaves(flow: Flow, value: Value) -> bool:
    readers = list(flow.final_readers(value))
    joined = [reader.outputs[0] for reader in readers if isinstance(reader, Operation) and reader.name in JOINS]
    if len(joined) < len(readers) or not (readers or value in flow.outputs):
        return False
    return all(_leaves(flow, flow.source(one)) for one in joined)
