from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import schedule as module
from schedule import Average, Schedule, set_rate, train


class Walk:
    """Adds a random number at each step."""

    def __init__(self) -> None:
        self.value = torch.zeros(())
        self.loss = 1.0

    def begin_round(self) -> None:
        self.offset = torch.rand(())

    def step(self, rate: float) -> Tensor:
        self.value = self.value + rate * torch.rand(()) + self.offset
        return torch.tensor(self.loss)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_rate_rises_and_falls() -> None:
    schedule = Schedule(steps=100, minutes=None, warmup=0.1)
    rates = []
    for schedule.step in range(100):
        rates.append(schedule.rate())
    assert rates[0] == pytest.approx(0.01) and rates[5] == pytest.approx(0.5) and rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5) and rates[99] < 0.001
    schedule.step = 100
    assert schedule.progress() == 1.0


def test_rate_rises_by_steps_where_minutes_passed_without_any() -> None:
    schedule = Schedule(steps=None, minutes=10.0, seconds=300.0)
    late = Schedule(steps=None, minutes=10.0, seconds=300.0, step=1000)
    assert 0.4 < late.rate() < 0.6
    assert schedule.rate() == pytest.approx(late.rate() / 200)


def test_stopped_training_ends_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole = Walk()
    assert train(whole, Schedule(10, None), tmp_path / "whole.pt", round_steps=3, seed=1)
    calls, done = 0, False
    while not done:
        part, schedule = Walk(), Schedule(10, None)
        done = train(part, schedule, tmp_path / "part.pt", round_steps=3, seed=1, call_minutes=0.0)
        calls += 1
    assert calls == 4
    assert torch.equal(part.value, whole.value) and schedule.step == 10
    finished = Walk()
    assert train(finished, Schedule(10, None), tmp_path / "part.pt", round_steps=3, seed=1)
    assert torch.equal(finished.value, whole.value)


@pytest.mark.parametrize(("steps", "seed"), [(10, 2), (12, 1)])
def test_a_state_of_another_training_is_refused(tmp_path: Path, steps: int, seed: int) -> None:
    assert train(Walk(), Schedule(10, None), tmp_path / "state.pt", round_steps=3, seed=1)
    with pytest.raises(SystemExit, match="of another training"):
        train(Walk(), Schedule(steps, None), tmp_path / "state.pt", round_steps=3, seed=seed)


def test_minutes_end_training_over_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 6))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    steps = []
    for _ in range(2):
        schedule = Schedule(None, 1.0)
        steps.append(train(Walk(), schedule, tmp_path / "state.pt", round_steps=2, seed=1, call_minutes=0.4))
    assert steps == [False, True]
    assert schedule.progress() == 1.0 and schedule.seconds >= 60


def test_a_loss_that_is_not_finite_stops_training_before_it_is_saved(tmp_path: Path) -> None:
    walk = Walk()
    walk.loss = float("nan")
    with pytest.raises(SystemExit, match="the loss is nan"):
        train(walk, Schedule(4, None), tmp_path / "state.pt", round_steps=2, seed=1)
    assert not (tmp_path / "state.pt").exists()


def test_average_follows_the_parameters() -> None:
    layer = nn.Linear(1, 1, bias=False)
    average = Average([layer], decay=0.5)
    expected = layer.weight.detach().clone()
    for step, value in enumerate((1.0, 2.0, 4.0), start=1):
        nn.init.constant_(layer.weight, value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    other = Average([nn.Linear(1, 1, bias=False)], decay=0.5)
    other.load_state_dict(average.state_dict())
    torch.testing.assert_close(other.values[0], expected)
    average.copy_to_parameters()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_rate_multiplies_the_first_learning_rate() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    for rate in (0.5, 0.25):
        set_rate(optimizer, rate)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
