"""Copying a network whose modules have a forward of their own: one set on the instance, `module.forward = ...`.

Such a function hides the forward of the class, so quantization, which gives modules a derived class, would never run;
and a plain copy of a network shares functions with the original, whose modules they then go on calling.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, cast

from torch import Tensor, nn

from synthquant.nn.derived import derived_class


class _Own:
    """A function set on an instance; a deep copy refers to the copies of the modules that it refers to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Own:
        copied = _Own(self.function)
        memo[id(self)] = copied
        copied.function = _rebound(self.function, memo)
        return copied


class OwnForward(nn.Module):
    """A module whose class calls what was set on the instance."""

    own_forward: _Own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.own_forward(*args, **kwargs)


def copy_network(network: nn.Module) -> nn.Module:
    """Return a deep copy in which forwards set on instances belong to the copy, and to classes.

    A function reaches the copies of the modules and tensors that it is bound to, or holds as arguments (`partial`),
    defaults or variables around it. Those that it reaches by global names stay those of the original.
    """
    memo: dict[int, Any] = {}
    copied = copy.deepcopy(network, memo)
    for part in list(network.modules()):
        own = part.__dict__.get("forward")
        if own is None:
            continue
        adopted = memo[id(part)]
        del adopted.__dict__["forward"]
        adopted.__class__ = derived_class(OwnForward, type(adopted), prefix="")
        adopted.own_forward = _Own(_rebound(own, memo))
    return copied


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """What stands for `value` in a copy: functions are made anew, modules and tensors are those of the copy."""
    if id(value) in memo:
        return memo[id(value)]
    made: Any = value
    if isinstance(value, nn.Module | Tensor):
        return copy.deepcopy(value, memo)
    if isinstance(value, MethodType):
        made = MethodType(_rebound(value.__func__, memo), _rebound(value.__self__, memo))
    elif isinstance(value, partial):
        keywords = {name: _rebound(argument, memo) for name, argument in value.keywords.items()}
        made = partial(_rebound(value.func, memo), *(_rebound(argument, memo) for argument in value.args), **keywords)
    elif isinstance(value, FunctionType):
        return _function(value, memo)
    elif type(value) in (list, tuple):
        made = type(value)(_rebound(item, memo) for item in value)
    elif type(value) is dict:
        made = {key: _rebound(item, memo) for key, item in value.items()}
    memo[id(value)] = made
    return made


def _function(value: FunctionType, memo: dict[int, Any]) -> FunctionType:
    if not value.__closure__ and not value.__defaults__ and not value.__kwdefaults__:
        return value
    cells = tuple(CellType() for _ in value.__closure__ or ())
    made = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
    memo[id(value)] = made  # before its variables: a function may refer to itself
    for cell, former in zip(cells, value.__closure__ or (), strict=True):
        cell.cell_contents = _rebound(former.cell_contents, memo)
    made.__defaults__ = cast("tuple[Any, ...] | None", _rebound(value.__defaults__, memo))
    made.__kwdefaults__ = _rebound(value.__kwdefaults__, memo)
    made.__dict__.update(value.__dict__)
    return made
