from __future__ import annotations

import pytest
import torch
from torch import nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.finetune.optimize import Optimizer, Trainer, rate_at


def parameters() -> dict[str, nn.Parameter]:
    return {
        "fast": nn.Parameter(torch.ones(3)),
        "slow": nn.Parameter(torch.ones(3)),
        "still": nn.Parameter(torch.ones(3)),
    }


def trainer(own: dict[str, nn.Parameter], optimizer: Optimizer, **changes: float) -> Trainer:
    rates = {"fast": 0.1, "slow": 0.01, "still": 0.0}
    decays = {"fast": changes.get("decay", 0.0), "slow": 0.0, "still": 0.0}
    return Trainer(own, rates, decays, optimizer=optimizer, momentum=0.9, clip=changes.get("clip", 0.0))


def train(own: dict[str, nn.Parameter], trained: Trainer, first: int, last: int) -> None:
    for number in range(first, last + 1):
        sum(((one - 3) ** 2 * number).sum() for one in own.values()).backward()  # type: ignore[union-attr]
        trained.step(rate_at(number, 10, 0.2))


def test_rates_rise_and_fall_to_almost_nothing() -> None:
    rates = [rate_at(step, 10, 0.2) for step in range(1, 11)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.05


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_groups_have_their_own_rates_and_a_state_goes_on_to_the_same_bytes(optimizer: Optimizer) -> None:
    whole, parts = parameters(), parameters()
    train(whole, trainer(whole, optimizer), 1, 6)
    assert (whole["fast"] - 1).abs().min() > 1.2 * (whole["slow"] - 1).abs().max() > 0
    assert torch.equal(whole["still"], torch.ones(3))
    first = trainer(parts, optimizer)
    train(parts, first, 1, 3)
    again = trainer(parts, optimizer)
    again.load({name: tensor.clone() for name, tensor in first.state().items()})
    train(parts, again, 4, 6)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_gradients_are_clipped_and_weights_decay() -> None:
    free, clipped, decayed = parameters(), parameters(), parameters()
    train(free, trainer(free, "sgd"), 1, 1)
    train(clipped, trainer(clipped, "sgd", clip=1e-3), 1, 1)
    train(decayed, trainer(decayed, "sgd", decay=10.0), 1, 1)
    assert (clipped["fast"] - 1).abs().max() < 1e-3 < (free["fast"] - 1).abs().max()
    assert (decayed["fast"] < free["fast"]).all() and torch.equal(decayed["slow"], free["slow"])


def test_nothing_to_learn_is_said() -> None:
    with pytest.raises(UnsupportedModelError, match="training would change nothing"):
        Trainer({}, {}, {}, optimizer="adamw", momentum=0.9, clip=0.0)
