"""One part of a trajectory as a file: what a denoiser was given of some images, each value once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from synthquant.core.errors import UnsupportedModelError
from synthquant.models.signature import Inputs

Form = dict[str, Any]
"""How arguments are made of named tensors, as plain data."""

TIME = "timestep"
"""The argument that is a time step: it is kept in its own precision."""

_CONSTANT = "constant "
_LISTS: dict[str, type] = {"list": list, "tuple": tuple}


def form_of(inputs: Inputs) -> Form:
    """Return how the keyword arguments of a call are made of tensors; raises `UnsupportedModelError` if a file cannot.

    Names are those of `named_tensors`.
    """
    return {name: _described(value, name) for name, value in inputs.kwargs.items()}


def named_tensors(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors with a row for each sample by their names, and those without."""
    varying = dict(inputs.named())
    constant: dict[str, Tensor] = {}
    for name in inputs.constants:
        _collect(inputs.kwargs[str(name)], str(name), constant)
    return varying, constant


def rebuilt(form: Form, tensors: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> Inputs:
    """Return the call that a form and tensors make."""
    kwargs = {name: _made(entry, {**constants, **tensors}) for name, entry in form.items()}
    return Inputs((), kwargs, frozenset(_without_rows(form, tensors)))


def packed(found: Sequence[Inputs], images: int, storage: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a part, for `rows_of`.

    Args:
        found: what the denoiser was given at each recorded step, rows of all images one after another; guidance
            repeats all of them.
        images: how many there are.
        storage: the precision of all but times, indices and masks.

    Returns:
        By name `[images, steps, repeats, ...]`; steps and repeats are 1 where a value is the same in all of them.
    """
    tensors: dict[str, Tensor] = {}
    varying = [named_tensors(inputs) for inputs in found]
    for name in varying[0][0]:
        # [steps, repeats * images, ...] to [images, steps, repeats, ...]
        stacked = torch.stack([one[name] for one, _ in varying])
        by_image = stacked.reshape(len(found), -1, images, *stacked.shape[2:]).movedim(2, 0)
        for dim in (1, 2):
            first = by_image.narrow(dim, 0, 1)
            if torch.equal(first.expand_as(by_image), by_image):
                by_image = first
        kept = name == TIME or not by_image.is_floating_point()
        tensors[name] = by_image if kept else by_image.to(storage)
    return tensors | {f"{_CONSTANT}{name}": tensor for name, tensor in varying[0][1].items()}


def rows_of(part: Mapping[str, Tensor], rows: Sequence[tuple[int, int, int]], form: Form) -> Inputs:
    """Return the rows `(image, step, repeat)` of a part as a call; floating-point numbers are float32."""
    image, step, repeat = (torch.tensor(column) for column in zip(*rows, strict=True))
    tensors, constants = {}, {}
    for name, tensor in part.items():
        if name.startswith(_CONSTANT):
            constants[name.removeprefix(_CONSTANT)] = tensor.float() if tensor.is_floating_point() else tensor
            continue
        found = tensor[image, step.clamp_max(tensor.shape[1] - 1), repeat.clamp_max(tensor.shape[2] - 1)]
        tensors[name] = found.float() if found.is_floating_point() else found
    return rebuilt(form, tensors, constants)


def _described(value: Any, name: str) -> Form:
    if isinstance(value, Tensor):
        return {"tensor": name}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(inner, f"{name}.{key}") for key, inner in value.items()}}
    for kind, cls in _LISTS.items():
        if type(value) is cls:
            return {kind: [_described(inner, f"{name}.{place}") for place, inner in enumerate(cast(list[Any], value))]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise UnsupportedModelError(
        f"the denoiser is given {name}, a {type(value).__name__}, which the file of a trajectory cannot hold"
    )


def _collect(value: Any, name: str, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[name] = value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _collect(inner, f"{name}.{key}", found)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            _collect(inner, f"{name}.{place}", found)


def _made(entry: Form, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = entry.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _made(inner, tensors) for key, inner in value.items()}
    if kind in _LISTS:
        return _LISTS[kind](_made(inner, tensors) for inner in value)
    return value


def _without_rows(form: Form, tensors: Mapping[str, Tensor]) -> list[str]:
    """Arguments that hold tensors, none of which has rows."""
    names = {name: _tensors_in(entry) for name, entry in form.items()}
    return [name for name, inside in names.items() if inside and not any(one in tensors for one in inside)]


def _tensors_in(entry: Form) -> list[str]:
    ((kind, value),) = entry.items()
    if kind == "tensor":
        return [value]
    inner = list(value.values()) if kind == "dict" else value if kind in _LISTS else []
    return [name for one in inner for name in _tensors_in(one)]
