"""Which channels of which tensors can be scaled together, so that a network computes the same.

Convolutions and linear layers can put out a channel divided by `s` and take it in multiplied by `s`, if all that makes
or reads that channel does so and what lies between passes factors on: sums (so a whole residual stream shares its
scales), concatenations, pooling, ReLU, and clipping, whose bounds take the factor too. Whatever else reads or makes a
tensor pins its channels, as do the network's input and output. Tensors are followed through one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from synthquant.core.modules import get_module
from synthquant.models.batch_norm import is_plain
from synthquant.models.operation_names import QUANTIZABLE
from synthquant.models.trace import ModuleCall, Operation, Trace, Value

_POOLINGS = tuple(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for n in (1, 2, 3))
_PASSING = frozenset(
    (
        *("relu", "leaky_relu", "contiguous", "clone", "detach", "view", "reshape", "flatten", "squeeze", "unsqueeze"),
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "mean", "amax", "interpolate"),
        *("mul", "imul", "rmul", "multiply", "truediv", "itruediv", "div", "neg", "pad", *_POOLINGS),
    )
)
"""Operations that read one tensor and put its channels out with the factors that they had."""
_SUMS = frozenset(("add", "iadd", "radd", "sub", "isub", "rsub", "subtract"))
_JOINS = frozenset(("cat", "concat", "concatenate"))
_CLIPS = frozenset(("hardtanh", "relu6"))


class Channels:
    """The channels of a network, numbered; channels that must share a scale have the same number.

    Attributes:
        count: how many numbers there are.
        pinned: bool `[count]`, those that cannot be scaled.
        made: for each layer that takes part, the numbers of the channels it puts out, int64 `[C_out]`.
        read: for each of them, the numbers of the channels it reads, int64 `[C_in]`.
        clips: for each `nn.Hardtanh` (`nn.ReLU6`) that takes part, the numbers of the channels it limits.
        shifts: layers whose output a ReLU or clip reads, and nothing else, and behind that nothing but layers without
            padding: the name of the clip ("" for a ReLU), and those layers. A constant can move through.
    """

    def __init__(self, module: nn.Module, seen: Trace, *, through_clips: bool = True) -> None:
        """Follow the tensors of a forward pass.

        Args:
            module: the network, batch norms folded.
            seen: its trace, on two images or more.
            through_clips: whether a clip can have a bound for each channel; otherwise it pins them.
        """
        self._module, self._seen, self._through_clips = module, seen, through_clips
        self._parents: list[int] = []
        self._of_value: dict[int, list[int]] = {}
        self._pinned: set[int] = set()
        made, read, clips = {}, {}, {}
        calls = self._layer_calls()
        for name, call in calls.items():
            made[name], read[name] = self._ids(call.outputs[0]), self._ids(call.inputs[0])
        inside = {call.index for call in calls.values()}
        for operation in seen.operations:
            if inside.isdisjoint(call.index for call in seen.enclosing(operation.call)):
                clip = self._follow(operation)
                if clip is not None:
                    clips[clip] = self._ids(operation.outputs[0])
        self._pin((*seen.calls("")[0].inputs, *seen.calls("")[0].outputs))
        self._number(made, read, clips)
        self.shifts = {name: shift for name in made if (shift := self._shift(calls, name)) is not None}

    def _layer_calls(self) -> dict[str, ModuleCall]:
        """The calls of layers that are nothing but a product with their own weight, of channels in dimension 1."""
        found = {}
        for name in self._seen.order:
            part, calls = get_module(self._module, name), self._seen.calls(name)
            if not isinstance(part, QUANTIZABLE) or len(calls) != 1:
                continue
            own = [operation for operation in self._seen.operations if operation.call == calls[0].index]
            if not own or not is_plain(self._seen, name, part, own[-1]) or calls[0].outputs != own[-1].outputs:
                continue
            padded = all(operation.name == "pad" for operation in own[:-1])
            axes = len(calls[0].inputs[0].shape), len(calls[0].outputs[0].shape)
            if padded and axes == (part.weight.ndim, part.weight.ndim):
                found[name] = calls[0]
        return found

    def _follow(self, operation: Operation) -> str | None:
        """Tie the channels that an operation reads to those it makes, or pin them; name the clip if it is one."""
        data = [value for value in operation.inputs if value.from_input]
        made = [value for value in operation.outputs if value.from_input]
        if not made:
            return None
        if len(made) == 1 and len(data) == len(operation.inputs):
            if len(data) == 1 and operation.name in _PASSING and self._tie_passed(data[0], made[0]):
                return None
            if len(data) > 1 and operation.name in _SUMS and _summable(data, made[0]):
                for value in data:
                    self._tie(self._ids(value), self._ids(made[0]))
                return None
            if operation.name in _JOINS and _joined(data, made[0]):
                self._tie([one for value in data for one in self._ids(value)], self._ids(made[0]))
                return None
            if operation.name in _CLIPS and (clip := self._clip_module(operation)) is not None:
                self._tie(self._ids(data[0]), self._ids(made[0]))
                return clip
        self._pin((*data, *made))
        return None

    def _tie_passed(self, read: Value, made: Value) -> bool:
        """Tie what one operation reads and makes, where the shapes leave no doubt which channel is which."""
        if len(read.shape) < 2 or len(made.shape) < 2 or read.shape[0] != made.shape[0]:
            return False
        channels, positions = read.shape[1], read.shape[2:].numel()
        if made.shape[1] == channels and (len(made.shape) == len(read.shape) or channels not in read.shape[2:]):
            self._tie(self._ids(read), self._ids(made))
            return True
        if len(made.shape) == 2 and made.shape[1] == channels * positions:  # each channel becomes several
            self._tie([one for one in self._ids(read) for _ in range(positions)], self._ids(made))
            return True
        return False

    def _clip_module(self, operation: Operation) -> str | None:
        """The module whose only work this clipping is; none if a function does it, it runs twice or is to stay."""
        if not self._through_clips:
            return None
        call = self._seen.module_calls[operation.call]
        own = isinstance(get_module(self._module, call.name), nn.Hardtanh) and len(self._seen.calls(call.name)) == 1
        return call.name if own and call.inputs == operation.inputs and call.outputs == operation.outputs else None

    def _shift(self, calls: Mapping[str, ModuleCall], name: str) -> tuple[str, tuple[str, ...]] | None:
        seen, value = self._seen, calls[name].outputs[0]
        readers, returned = seen.consumers(value), seen.module_calls[0].outputs
        if len(readers) != 1 or value in returned or readers[0].name not in ("relu", *_CLIPS):
            return None
        operation = readers[0]
        clip = "" if operation.name == "relu" else self._clip_module(operation)
        result = operation.outputs[0]
        owners = [seen.module_calls[reader.call].name for reader in seen.consumers(result)]
        if clip is None or not owners or result in returned:
            return None
        unpadded = all(owner in calls and _is_pointwise(get_module(self._module, owner)) for owner in owners)
        return (clip, tuple(owners)) if unpadded else None

    def _ids(self, value: Value) -> list[int]:
        if value.index not in self._of_value:
            width = value.shape[1] if len(value.shape) > 1 else 1
            self._of_value[value.index] = list(range(len(self._parents), len(self._parents) + width))
            self._parents.extend(self._of_value[value.index])
        return self._of_value[value.index]

    def _root(self, one: int) -> int:
        while self._parents[one] != one:
            self._parents[one] = one = self._parents[self._parents[one]]
        return one

    def _tie(self, some: Iterable[int], others: Iterable[int]) -> None:
        for one, other in zip(some, others, strict=True):
            self._parents[self._root(one)] = self._root(other)

    def _pin(self, values: Iterable[Value]) -> None:
        self._pinned.update(one for value in values for one in self._ids(value))

    def _number(
        self, made: Mapping[str, list[int]], read: Mapping[str, list[int]], clips: Mapping[str, list[int]]
    ) -> None:
        """Give the channels that layers make and read numbers from 0."""
        numbers: dict[int, int] = {}

        def numbered(ids: Mapping[str, list[int]]) -> dict[str, Tensor]:
            roots = {name: [self._root(one) for one in group] for name, group in ids.items()}
            return {
                name: torch.tensor([numbers.setdefault(root, len(numbers)) for root in group])
                for name, group in roots.items()
            }

        self.made, self.read, self.clips = numbered(made), numbered(read), numbered(clips)
        self.count = len(numbers)
        pinned = {self._root(one) for one in self._pinned}
        self.pinned = torch.tensor([root in pinned for root in numbers])
        for used in (self.made, self.read):  # what no layer makes, or none reads, has nothing to take the factor
            seen = torch.zeros(self.count, dtype=torch.bool)
            for group in used.values():
                seen[group] = True
            self.pinned |= ~seen


def _is_pointwise(layer: nn.Module) -> bool:
    """Whether a constant that is added to a channel adds a constant to what the layer puts out, at the borders too."""
    if isinstance(layer, nn.Linear):
        return True
    kernel = layer.kernel_size if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else (0,)
    return all(size == 1 for size in kernel) and layer.padding in ("valid", "same", *((0,) * n for n in (1, 2, 3)))


def _summable(values: list[Value], made: Value) -> bool:
    return len(made.shape) > 1 and all(
        len(value.shape) == len(made.shape) and value.shape[:2] == made.shape[:2] for value in values
    )


def _joined(values: list[Value], made: Value) -> bool:
    """Whether tensors were joined along their channels."""
    if any(len(value.shape) != len(made.shape) or len(value.shape) < 2 for value in values):
        return False
    same = all(value.shape[0] == made.shape[0] and value.shape[2:] == made.shape[2:] for value in values)
    return same and sum(value.shape[1] for value in values) == made.shape[1]
