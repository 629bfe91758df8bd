"""Batch norm: the layers, the statistics they keep of the training data, and folding them into what comes before."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synthquant.core.modules import get_module, replace_module
from synthquant.models.signature import Inputs
from synthquant.models.trace import ModuleCall, Operation, Trace, trace

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
_Foldable = _Convolution | _Transposed | nn.Linear

_OPERATIONS = frozenset(
    ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")
)


@dataclass(frozen=True)
class BatchNormTarget:
    """What a batch norm remembers of its inputs in training, per channel."""

    mean: Tensor
    """`[C]`, running mean."""
    variance: Tensor
    """`[C]`, running (unbiased) variance, without epsilon."""


def batch_norm_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """All batch norms by module name, in the order of the module tree; subclasses with a built-in activation too."""
    return {name: part for name, part in module.named_modules() if isinstance(part, _BatchNorm)}


def batch_norm_targets(module: nn.Module) -> dict[str, BatchNormTarget]:
    """The running statistics of all batch norms by module name; those that keep none are left out."""
    targets = {}
    for name, layer in batch_norm_layers(module).items():
        if layer.running_mean is not None and layer.running_var is not None:
            targets[name] = BatchNormTarget(layer.running_mean.detach(), layer.running_var.detach())
    return targets


def untrained_batch_norms(module: nn.Module) -> list[str]:
    """Names of the batch norms whose statistics are those they are made with: all means 0, all variances 1."""
    return [
        name
        for name, target in batch_norm_targets(module).items()
        if bool((target.mean == 0).all()) and bool((target.variance == 1).all())
    ]


def is_untrained(module: nn.Module) -> bool:
    """Whether a network has batch norms and none of them has seen a batch."""
    names = untrained_batch_norms(module)
    return bool(names) and len(names) == len(batch_norm_targets(module))


def batch_norm_findings(module: nn.Module) -> list[str]:
    """What is odd about the statistics of the batch norms, a line each: none has seen a batch, or variances are 0."""
    targets, untrained = batch_norm_targets(module), untrained_batch_norms(module)
    findings = []
    if untrained:
        which = "none of its" if len(untrained) == len(targets) else f"{len(untrained)} of its"
        has = "has seen a batch" if len(untrained) == len(targets) else f"have seen no batch, {untrained[0]} first,"
        findings.append(
            f"it looks untrained: {which} {len(targets)} batch norms {has} (mean 0, variance 1); is --weights missing?"
        )
    dead = {name: int((target.variance <= 0).sum()) for name, target in targets.items()}
    dead = {name: count for name, count in dead.items() if count}
    if dead:
        first = next(iter(dead))
        findings.append(
            f"{len(dead)} of its {len(targets)} batch norms keep variances of 0, {first} first, in {dead[first]} of"
            f" {len(targets[first].variance)} channels: what entered there never changed"
        )
    return findings


def fold_batch_norms(module: nn.Module, example: Inputs | Tensor) -> list[tuple[str, str]]:
    """Fold batch norms into the layers whose output they normalise, in place, and return (batch norm, layer) names.

    A batch norm is folded where one forward pass of `example` shows that its input is exactly what a
    convolution, transposed convolution or linear layer returned, that nothing else reads it, and that both run once
    with weights of their own. It leaves `nn.Identity`, or the modules it ran after normalising (drop, activation).
    Others stay. Outputs are the same up to rounding: new weights are computed in float64.
    """
    seen = trace(module, example)
    found = []
    for name, norm in batch_norm_layers(module).items():
        partner = _folds_into(seen, module, name, norm)
        if partner is not None:
            found.append((name, norm, *partner))
    for name, norm, _, layer in found:
        _fold(layer, norm)
        children = OrderedDict((child, get_module(norm, child)) for child in _modules_after(seen, name))
        replace_module(module, name, nn.Sequential(children) if children else nn.Identity())
    return [(name, layer_name) for name, _, layer_name, _ in found]


def _folds_into(seen: Trace, module: nn.Module, name: str, norm: _BatchNorm) -> tuple[str, _Foldable] | None:
    """Name and module of the layer that a batch norm can be folded into, or none."""
    calls = seen.calls(name)
    if len(calls) != 1 or norm.running_mean is None or norm.running_var is None:
        return None
    call = calls[0]
    own = [operation for operation in seen.operations if operation.call == call.index]
    # A subclass may do more than normalise and call other modules; then it cannot be taken apart.
    if len(own) != 1 or own[0].name != "batch_norm" or not _is_chain(seen, call, own[0]):
        return None
    value = own[0].inputs[0]
    producer = seen.producer(value)
    if producer is None or call.inputs != (value,) or seen.consumers(value) != (own[0],):
        return None
    source = seen.module_calls[producer.call]
    layer = get_module(module, source.name)
    if not isinstance(layer, _Foldable) or source.outputs != (value,) or value in seen.module_calls[0].outputs:
        return None
    if not is_plain(seen, source.name, layer, producer):
        return None
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    # On more than two dimensions batch norm takes dimension 1 for the channels, and linear layers the last.
    fits = len(value.shape) == layer.weight.ndim and value.shape[1] == channels == norm.num_features
    return (source.name, layer) if fits else None


def is_plain(seen: Trace, name: str, layer: nn.Module, operation: Operation) -> bool:
    """Whether a layer is called once and hands its own weight and bias to its operation, as they are.

    That is not so for standardised, normalised or masked weights, and for weights that other layers use too.
    """
    if operation.name not in _OPERATIONS or len(seen.calls(name)) != 1 or "weight" not in layer._parameters:
        return False
    parameters = [
        seen.parameters[f"{name}.{key}".lstrip(".")] for key in layer._parameters if layer._parameters[key] is not None
    ]
    return all(value in operation.inputs and seen.consumers(value) == (operation,) for value in parameters)


def _is_chain(seen: Trace, call: ModuleCall, operation: Operation) -> bool:
    """Whether what a batch norm returns is its normalised input, passed through its child modules one by one."""
    value = operation.outputs[0]
    for child in _children(seen, call):
        if not child.inputs or child.inputs[0] != value or len(child.outputs) != 1:
            return False
        value = child.outputs[0]
    return call.outputs == (value,)


def _children(seen: Trace, call: ModuleCall) -> list[ModuleCall]:
    return [child for child in seen.module_calls if child.parent == call.index]


def _modules_after(seen: Trace, name: str) -> list[str]:
    """Names, below the batch norm, of the modules it calls after normalising."""
    return [child.name.removeprefix(f"{name}.") for child in _children(seen, seen.calls(name)[0])]


@torch.no_grad()
def _fold(layer: _Foldable, norm: _BatchNorm) -> None:
    """`w' = w * scale`, `b' = (b - mean) * scale + beta` with `scale = gamma / sqrt(variance + eps)` per channel."""
    assert norm.running_mean is not None and norm.running_var is not None
    mean, variance = _exact(norm.running_mean), _exact(norm.running_var)
    gamma = torch.ones_like(mean) if norm.weight is None else _exact(norm.weight)
    beta = torch.zeros_like(mean) if norm.bias is None else _exact(norm.bias)
    bias = torch.zeros_like(mean) if layer.bias is None else _exact(layer.bias)
    scale = gamma / torch.sqrt(variance + norm.eps)
    weight = _exact(layer.weight)
    if isinstance(layer, _Transposed):
        # `[C_in, C_out / groups, ...]`: the output channels of a group lie along dimension 1.
        grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])
        factor = scale.reshape(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = (grouped * factor).flatten(0, 1)
    else:
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    layer.weight.copy_(weight)
    folded = ((bias - mean) * scale + beta).to(layer.weight)
    layer.bias = nn.Parameter(folded, requires_grad=layer.weight.requires_grad)


def _exact(tensor: Tensor) -> Tensor:
    # On the CPU, because not every accelerator knows float64.
    return tensor.detach().cpu().double()
