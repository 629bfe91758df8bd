"""A `FloatModel` from a module that a program has in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from synthquant.core.errors import ModelError
from synthquant.core.progress import QUIET
from synthquant.core.settings import parse_settings
from synthquant.data.preprocess import Preprocess
from synthquant.models.batch_norm import batch_norm_findings
from synthquant.models.float_model import IN_MEMORY, FloatModel, ModelSource, Task
from synthquant.models.libraries import known_of_module
from synthquant.models.open import count_classes, prepared
from synthquant.models.opened import FOREIGN_ERRORS
from synthquant.models.signature import Inputs
from synthquant.models.user_file import plain_module
from synthquant.models.weights import one_line

_IMAGES = ("input_size", "mean", "std")


def model_of_module(
    module: nn.Module,
    images: Mapping[str, Any],
    *,
    preprocess: Preprocess | None,
    example: Any,
    name: str | None,
    task: Task | None,
    num_classes: int | None,
    class_names: Sequence[str] | None,
    trained: bool = True,
) -> FloatModel:
    """Do the work of `FloatModel.from_module`, which says what is raised.

    `images` are `input_size`, `mean` and `std`, none where they are not given. Of a network that need not be `trained`
    nothing is said about its weights.
    """
    if not isinstance(module, nn.Module):
        raise ModelError(f"a {type(module).__name__} is no torch.nn.Module")
    name = name or type(module).__name__
    given = {key: _as_setting(key, value) for key, value in images.items() if value is not None}
    source = parse_settings(ModelSource, {"source": f"{IN_MEMORY}/{name}", **given}, f"network {name}")
    takes = _takes(module, source, given, preprocess, example)
    model = FloatModel(_copied(module, name), takes, name, source)
    task = task or _task_of(model)
    model = replace(model, source=source.model_copy(update={"task": task}), task=task)
    classes = count_classes(model)
    if num_classes is not None and num_classes != classes:
        gives = "no logits" if classes is None else f"logits of {classes} classes"
        raise ModelError(f"{name} gives {gives}, and num_classes is {num_classes}")
    if class_names is not None and len(class_names) != classes:
        raise ModelError(f"{len(class_names)} class_names for a network of {classes or 'no'} classes")
    names = None if class_names is None else tuple(str(one) for one in class_names)
    for finding in batch_norm_findings(model.module) if trained else ():
        QUIET.warn(f"{name}: {finding}")
    return replace(model, num_classes=classes, class_names=names)


def architecture_of(module: nn.Module, preprocess: Preprocess, name: str, task: Task) -> FloatModel:
    """Return a module as the architecture of a checkpoint, whatever its weights; raises as `model_of_module`."""
    known: dict[str, Any] = {"example": None, "num_classes": None, "class_names": None}
    return model_of_module(module, {}, preprocess=preprocess, name=name, task=task, trained=False, **known)


def _copied(module: nn.Module, name: str) -> nn.Module:
    """A frozen copy without what `torch.compile` wraps; the module stays as it is."""
    try:
        own = copy.deepcopy(module)
    except FOREIGN_ERRORS as error:
        raise ModelError(
            f"{name} cannot be copied ({one_line(error)}); keep tensors as parameters or buffers"
        ) from error
    return plain_module(own, name).float().eval().requires_grad_(False)


def _as_setting(key: str, value: Any) -> Any:
    """One number for a square, or for one channel, in full."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value, value) if key == "input_size" else (value,)
    return tuple(value)


def _takes(
    module: nn.Module, source: ModelSource, given: Mapping[str, Any], preprocess: Preprocess | None, example: Any
) -> Preprocess | Inputs:
    """What the network takes, said in one way."""
    ways = [*(["preprocess"] if preprocess is not None else []), *(["example"] if example is not None else []), *given]
    both = [way for way in ("preprocess", "example") if way in ways]
    if both and len(ways) > 1:
        raise ModelError(
            f"{source.source}: {', '.join(ways)} say twice what the network takes; give a preprocess, or input_size,"
            " mean and std, or an example"
        )
    if preprocess is not None:
        return preprocess
    if example is not None:
        inputs = _inputs(example, source)
        if len(inputs) == 0:
            raise ModelError(f"{source.source}: the example of its inputs has 0 samples; give one or more")
        return inputs
    known = known_of_module(module, source)
    missing = [key for key in _IMAGES if key not in given]
    if known is None and missing:
        raise ModelError(
            f"{source.source} does not say how its images are prepared; give synthquant.FloatModel.from_module(module,"
            f" {', '.join(f'{key}=...' for key in missing)}), or an example=... of what else it takes"
        )
    return prepared(known, source)


def _inputs(example: Any, source: ModelSource) -> Inputs:
    if isinstance(example, Inputs | Tensor):
        return Inputs.of(example)
    if isinstance(example, Mapping):
        return Inputs(kwargs=dict(example))
    if isinstance(example, list | tuple):
        return Inputs(args=tuple(example))
    raise ModelError(
        f"{source.source}: an example is a tensor, a tuple of arguments, a dictionary of keywords, or"
        f" synthquant.Inputs; this is a {type(example).__name__}"
    )


@torch.no_grad()
def _task_of(model: FloatModel) -> Task:
    """To classify, where what the network gives can be logits; one that fails is told of where it is run again."""
    example = model.example()
    try:
        output = example.call(model.module)
    except FOREIGN_ERRORS:
        return "classify"
    logits = isinstance(output, Tensor) and output.ndim == 2 and len(output) == len(example)
    return "classify" if logits and output.is_floating_point() else "other"
