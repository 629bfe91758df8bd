"""Training that is cut into rounds, continues where it was stopped, and ends after a number of steps or of minutes."""

from __future__ import annotations

import math
import os
import platform
import time
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass
class Schedule:
    """How far training is; the learning rate is a function of it alone.

    Exactly one of `steps` and `minutes` says how long training takes, over all calls together. With `steps`, equal
    arguments give equal weights on equal hardware; `minutes` is for a machine of unknown speed.
    """

    steps: int | None
    minutes: float | None
    warmup: float = 0.05
    step: int = 0
    seconds: float = 0.0

    def progress(self) -> float:
        """Share of training that is over, 0..1."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        assert self.minutes is not None
        return min(1.0, self.seconds / (60 * self.minutes))

    def rate(self) -> float:
        """Factor of the learning rate: a linear rise over `warmup`, then half a cosine to zero.

        With `minutes` it also rises over 200 steps: compiling may have used up the minutes of `warmup`.
        """
        return self._rate_of(self.progress()) * (1 if self.steps else min(1.0, (self.step + 1) / 200))

    def _rate_of(self, progress: float) -> float:
        if progress < self.warmup:
            return max(0.01, progress / self.warmup)
        return 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


class Trainer(Protocol):
    """What is trained."""

    def begin_round(self) -> None: ...

    def step(self, rate: float) -> Tensor:
        """One optimisation step at `rate` times the learning rate; returns the loss, detached."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train(
    trainer: Trainer,
    schedule: Schedule,
    state: Path,
    *,
    round_steps: int,
    seed: int,
    call_minutes: float = math.inf,
    save_seconds: float = 60.0,
) -> bool:
    """Train to the end of the schedule or of this call; returns whether the schedule is done.

    Continues from `state` and saves to it after rounds, at most every `save_seconds` and at the end. Each round draws
    its random numbers from a seed of its own, so that a stopped training ends as one that was never stopped. A state of
    another seed or length is of another training: raises `SystemExit`.
    """
    of = {"seed": seed, "steps": schedule.steps, "minutes": schedule.minutes}
    if state.exists():
        saved_state = torch.load(state, weights_only=True, map_location="cpu")
        if saved_state.get("of") != of:
            raise SystemExit(f"{state} is of another training ({saved_state.get('of')}, not {of}); name another folder")
        trainer.load_state_dict(saved_state["trainer"])
        schedule.step, schedule.seconds = saved_state["step"], saved_state["seconds"]
    began, earlier = time.monotonic(), schedule.seconds
    saved = began
    while schedule.progress() < 1:
        torch.manual_seed(seed * 1_000_003 + schedule.step)
        trainer.begin_round()
        losses: list[Tensor] = []
        while len(losses) < round_steps and schedule.progress() < 1:
            losses.append(trainer.step(schedule.rate()))
            schedule.step += 1
            schedule.seconds = earlier + time.monotonic() - began
        # Reading the loss waits for the device: the one synchronisation of a round.
        loss = torch.stack(losses).mean().item()
        now = time.monotonic()
        schedule.seconds = earlier + now - began
        print(f"step {schedule.step} {schedule.progress():.1%} loss {loss:.4f} {schedule.seconds:.0f} s", flush=True)
        if not math.isfinite(loss):
            raise SystemExit(f"the loss is {loss}; the last good state is in {state}")
        over = now - began > call_minutes * 60
        if over or schedule.progress() >= 1 or now - saved > save_seconds:
            save_state(trainer, schedule, state, of)
            saved = now
        if over:
            break
    return schedule.progress() >= 1


def save_state(trainer: Trainer, schedule: Schedule, path: Path, of: dict[str, Any]) -> None:
    """Write the state so that a kill leaves the old file or the new one; `of` says which training's it is."""
    temporary = path.with_suffix(".tmp")
    content = {"trainer": trainer.state_dict(), "step": schedule.step, "seconds": schedule.seconds, "of": of}
    torch.save(content, temporary)
    os.replace(temporary, path)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times its first one."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.setdefault("initial_lr", group["lr"])


class Average:
    """Exponential moving average of the parameters of modules; the first updates average over fewer steps."""

    def __init__(self, modules: Iterable[nn.Module], decay: float) -> None:
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.values = [parameter.detach().clone() for parameter in self.parameters]
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Put the averages in place of the parameters."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)


def add_arguments(parser: ArgumentParser) -> None:
    """Add what all training scripts take."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the result and of the state")
    parser.add_argument("--limit", type=int, help="use this many rows of each file only (to try a script)")
    parser.add_argument("--total-minutes", type=float, help="length of training in minutes instead of in steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; the next call continues")
    parser.add_argument("--save-seconds", type=float, default=60.0, help="save the state this often")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the network (minutes at first, then faster)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def describe_run(schedule: Schedule, seed: int, device: torch.device) -> dict[str, Any]:
    """What a card says about the run."""
    return {
        "steps": schedule.step,
        "seconds": round(schedule.seconds),
        "seed": seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
    }
