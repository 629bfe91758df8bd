"""What split layers read under `deploy: full`: pieces of a tensor, and concatenations that they take apart again.

A split layer (`split_shortcuts`) cuts the tensor it reads into a piece for each of its parts. Where that tensor is a
concatenation and nothing else needs codes of it, the concatenation is undone: each piece is the tensor that was joined,
quantized where that is made, on its own grid. Elsewhere each part quantizes the piece it reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from synthquant.models.trace import Operation, Value
from synthquant.nn.moves import JOINS, MOVES, is_move

if TYPE_CHECKING:
    from synthquant.nn.placement import Flow

_SAME = frozenset(MOVES["Identity"])


class Pieces:
    """The cuts of a forward pass."""

    def __init__(self, flow: Flow, splits: Collection[str]) -> None:
        """Look at nothing yet.

        Args:
            flow: the forward pass.
            splits: names of split layers.
        """
        self._flow, self._splits = flow, frozenset(splits)

    @property
    def splits(self) -> frozenset[str]:
        """Names of split layers."""
        return self._splits

    def cuts(self, operation: Operation) -> bool:
        """Whether an operation is the one with which a split layer cuts what it reads."""
        if operation.name != "split" or operation.owner is None:
            return False
        return self._flow.seen.module_calls[operation.owner].name in self._splits

    def is_undone(self, operation: Operation) -> bool:
        """Whether an operation joins tensors of which split layers get back each for itself."""
        return bool(self._splits) and operation.outputs[0].index in self._undone

    def origin(self, value: Value) -> Value:
        """The tensor that a piece was before it was joined; any other value itself."""
        return self._origins.get(value.index, value) if self._splits else value

    def made_of(self, value: Value) -> list[Value]:
        """The pieces that are this tensor again."""
        return [piece for piece, origin in self._of_undone if origin == value]

    @cached_property
    def _undone(self) -> dict[int, list[Operation]]:
        """The cuts of each concatenation that is undone, by the value it makes."""
        found = {}
        for operation in self._flow.operations:
            made = operation.outputs[0]
            if operation.name not in JOINS or len(operation.inputs) < 2 or made in self._flow.seen.calls("")[0].outputs:
                continue
            readers = list(self._readers(made))
            cuts = [one for one in readers if isinstance(one, Operation) and self._undoes(one, operation)]
            if cuts and all(one in cuts or self._is_in_float(one) for one in readers):
                found[made.index] = cuts
        return found

    @cached_property
    def _of_undone(self) -> list[tuple[Value, Value]]:
        """Pairs of a piece and what it was."""
        joins = {operation.outputs[0].index: operation for operation in self._flow.operations}
        pairs = ((cut, joins[made]) for made, cuts in self._undone.items() for cut in cuts)
        return [pair for cut, join in pairs for pair in zip(cut.outputs, join.inputs, strict=True)]

    @cached_property
    def _origins(self) -> dict[int, Value]:
        return {piece.index: origin for piece, origin in self._of_undone}

    def _readers(self, value: Value) -> Iterator[Operation | str]:
        """What reads a value or a copy of it."""
        for reader in self._flow.readers(value):
            if isinstance(reader, Operation) and reader.name in _SAME:
                for output in reader.outputs:
                    yield from self._readers(output)
            else:
                yield reader

    def _is_in_float(self, reader: Operation | str) -> bool:
        return isinstance(reader, Operation) and not is_move(reader) and not self._flow.could_read_integers(reader)

    def _undoes(self, cut: Operation, join: Operation) -> bool:
        """Whether an operation cuts a concatenation into what was joined."""
        return self.cuts(cut) and [piece.shape for piece in cut.outputs] == [part.shape for part in join.inputs]
