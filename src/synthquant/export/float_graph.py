"""The float network as a program of `torch.export`, beside a checkpoint; `graph_network` reads it back as modules."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import UnsupportedModelError
from synthquant.export.flat import constant_batch
from synthquant.models.float_model import FloatModel
from synthquant.models.signature import Inputs

GRAPH_NAME = "float_graph.pt2"
# What tracing a foreign network may raise: its own code runs, and torch.export has no error class of its own.
TRACING_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError)

CONTAINERS: dict[str, type[nn.Module]] = {
    "sequential": nn.Sequential,
    "list": nn.ModuleList,
    "dict": nn.ModuleDict,
}
CONTAINERS_FILE, CONSTANTS_FILE = "containers.json", "constants.json"


def float_graph(model: FloatModel) -> bytes:
    """Return the network as a program of `torch.export`, weights included, for any number of samples.

    Raises:
        UnsupportedModelError: `torch.export` cannot follow it; says why.
    """
    if model.device.type != "cpu":
        model = replace(model, module=copy.deepcopy(model.module).cpu())
    takes = model.example(2)
    try:
        program = torch.export.export(
            model.module, takes.args, dict(takes.kwargs), dynamic_shapes=_free_batch(takes), strict=False
        )
    except TRACING_ERRORS as error:
        raise unfollowed(model.name, error) from error
    containers = {name: kind for name, part in model.module.named_modules() if name and (kind := _container(part))}
    buffer = io.BytesIO()
    extra = {CONTAINERS_FILE: json.dumps(containers), CONSTANTS_FILE: json.dumps(sorted(takes.constants, key=str))}
    torch.export.save(program, buffer, extra_files=extra)
    return buffer.getvalue()


def unfollowed(name: str, error: Exception) -> UnsupportedModelError:
    """The error for a network that `torch.export` cannot follow, of what it raised."""
    if "specialized it to be a constant" in str(error):
        return constant_batch(name)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UnsupportedModelError(f"{name}: torch.export cannot follow it: {reason}")


def _free_batch(takes: Inputs) -> Any:
    """What `torch.export` is told of the arguments: the number of samples is free, where they have samples."""
    batch = torch.export.Dim("batch")
    varying = {id(leaf) for leaf in takes.tensors}

    def shape(leaf: Any) -> Any:
        return {0: batch} if id(leaf) in varying else None

    return (*pytree.tree_map(shape, takes.args), *pytree.tree_map(shape, tuple(takes.kwargs.values())))


def _container(part: nn.Module) -> str | None:
    """What kind of container a module is, if it only holds others."""
    for name, kind in CONTAINERS.items():
        if isinstance(part, kind) and type(part).forward is kind.forward:
            return name
    return None
