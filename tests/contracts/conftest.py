from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.small_networks import small_float_model

from synthquant.models.float_model import FloatModel


@dataclass(frozen=True)
class State:
    """All of a network that a method might change and must not."""

    fingerprint: str
    training: tuple[bool, ...]
    requires_grad: tuple[bool, ...]
    gradients: tuple[bool, ...]
    hooks: int
    types: tuple[str, ...]


def state_of(model: FloatModel) -> State:
    modules, parameters = list(model.module.modules()), list(model.module.parameters())
    return State(
        fingerprint=model.fingerprint,
        training=tuple(module.training for module in modules),
        requires_grad=tuple(parameter.requires_grad for parameter in parameters),
        gradients=tuple(parameter.grad is not None for parameter in parameters),
        hooks=sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules),
        types=tuple(type(module).__name__ for module in modules),
    )


@pytest.fixture
def model(tmp_path: Path) -> FloatModel:
    return small_float_model(tmp_path)


@pytest.fixture
def state(model: FloatModel) -> Callable[[], State]:
    return lambda: state_of(model)
