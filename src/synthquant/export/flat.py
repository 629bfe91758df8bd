"""A network as a map from tensors to tensors, whatever trees it takes and gives: what exporters and runtimes know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import UnsupportedModelError
from synthquant.models.float_model import FloatModel
from synthquant.models.signature import Inputs, path_name

FlatFunction = Callable[[Sequence[Tensor]], list[Tensor]]
"""The tensors that vary, in the order of the inputs, to all tensors of the output, in its order; on the CPU."""


class FlatNetwork(nn.Module):
    """A network that takes the tensors of its inputs that vary, and gives all tensors of its output.

    Constants of the inputs are part of it.
    """

    def __init__(self, network: nn.Module, takes: Inputs) -> None:
        """Take a network and an example of its inputs."""
        super().__init__()
        self.network = network
        self._takes = takes

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the network gives; a lone tensor as it is."""
        args, kwargs = self._takes.arguments(tensors)
        leaves = tuple(leaf for leaf in pytree.tree_leaves(self.network(*args, **kwargs)) if isinstance(leaf, Tensor))
        return leaves[0] if len(leaves) == 1 else leaves


def flat_output(output: Any) -> list[Tensor]:
    """All tensors of what a network gave, in order, on the CPU."""
    return [leaf.detach().cpu() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def input_names(model: FloatModel) -> list[str]:
    """Names of the tensors that vary: `images`, or by the parameters of the network's forward and the way in trees."""
    if not isinstance(model.takes, Inputs):
        return ["images"]
    parameters = list(inspect.signature(type(model.module).forward).parameters.values())[1:]
    plain = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    names = []
    for name, _ in model.takes.named():
        first, dot, rest = name.partition(".")
        if first.isdecimal():
            first = plain[int(first)] if int(first) < len(plain) else f"input_{first}"
        names.append(f"{first}{dot}{rest}")
    return names


@torch.no_grad()
def output_names(model: FloatModel) -> list[str]:
    """Names of all tensors of the output: `logits`, or their way in its tree; one that an input has ends in `_out`."""
    if model.task == "classify":
        return ["logits"]
    flat, _ = pytree.tree_flatten_with_path(model.example(2).call(model.module))
    taken, names = set(input_names(model)), []
    for path, leaf in flat:
        if isinstance(leaf, Tensor):
            name = path_name(path)
            name = "output" if not name else f"output_{name}" if name[0].isdecimal() else name
            names.append(f"{name}_out" if name in taken else name)
    return names


def dynamic_shapes(takes: Inputs) -> tuple[tuple[dict[int, Any], ...]]:
    """What `torch.export` is told of the arguments of a `FlatNetwork`: the number of samples is free."""
    batch = torch.export.Dim("batch")
    return (tuple({0: batch} for _ in takes.tensors),)


def constant_batch(name: str) -> UnsupportedModelError:
    """The error for a network that can only be exported for one size of the batch."""
    return UnsupportedModelError(
        f"{name} cannot be exported: it computes the batch size as a plain number, which export makes a constant, most"
        " often by int(x.shape[0] / n) in a forward; write x.shape[0] // n there, or reshape with -1"
    )
