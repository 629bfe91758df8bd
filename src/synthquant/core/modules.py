"""Finding, replacing and watching parts of a network; whatever is changed for a while is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from synthquant.core.errors import ModelError, did_you_mean

Hook = Callable[..., Any]


def get_module(root: nn.Module, name: str) -> nn.Module:
    """Return the submodule called `name` (dotted; "" is the root itself); raises `ModelError` if there is none."""
    try:
        return root.get_submodule(name)
    except AttributeError:
        names = [known for known, _ in root.named_modules()]
        raise ModelError(f"{type(root).__name__} has no module {name!r};{did_you_mean(name, names)}") from None


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule called `name` is, wherever the root refers to that submodule.

    Raises `ModelError` if there is no such submodule or `name` is the root.
    """
    if not name:
        raise ModelError("the root of a network cannot be replaced inside itself")
    old = get_module(root, name)
    # A module that is used under several names stays one module.
    for parent in list(root.modules()):
        for child_name, child in list(parent.named_children()):
            if child is old and parent is not new:
                setattr(parent, child_name, new)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode; afterwards each submodule has its own former mode again."""
    former = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in former:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are; the CPU if it has none."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def keeping_dtype(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What `nn.Module.to` and its relatives apply to tensors, without the change of their dtype."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Switch gradients of all parameters off; afterwards each parameter has its own former setting again."""
    former = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in former:
            parameter.requires_grad_(requires_grad)


@contextmanager
def forwards_replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Let modules run other functions in place of their forward for a while; hooks still run around them.

    Afterwards each has its class's forward again, or the one that was set on the instance before.
    """
    former: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        for module, forward in forwards:
            former.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in reversed(former):  # a module that was named twice gets back what it had at first
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own


@contextmanager
def hooked(
    forward: Iterable[tuple[nn.Module, Hook]] = (),
    *,
    pre: Iterable[tuple[nn.Module, Hook]] = (),
    with_kwargs: bool = False,
) -> Iterator[None]:
    """Register hooks for a while: `forward` after, `pre` before a module's call; always removed again.

    Hooks have PyTorch's signatures: `hook(module, args, output)` and `hook(module, args)`, or with `with_kwargs`
    `hook(module, args, kwargs, output)` and `hook(module, args, kwargs)`.
    """
    handles = []
    try:
        for module, hook in pre:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs))
        for module, hook in forward:
            handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs))
        yield
    finally:
        for handle in handles:
            handle.remove()
