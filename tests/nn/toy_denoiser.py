"""A small denoiser with every kind of layer that modulation meets, and what a sampler gives it step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.signature import Inputs

TIMES = (900, 700, 500, 300, 100)


class Denoiser(nn.Module):
    """Grouped and transposed convolutions, time layers, attention; one layer's output is overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(8, 8)
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="circular")
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2)
        self.conv_out = nn.Conv2d(8, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        angle = timestep.reshape(-1, 1).float() * torch.tensor([1e-2, 3e-3, 1e-3, 1e-4])
        time = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], 1).to(sample.dtype)))
        h = F.relu_(self.conv_in(sample)) + time[:, :, None, None]
        h = h + F.silu(self.grouped(h))
        tokens = self.down(h).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        tokens = tokens + F.scaled_dot_product_attention(q, k, v)
        return (self.conv_out(h + self.up(tokens.transpose(1, 2).reshape(len(h), 8, 4, 4))),)


def denoiser(network: nn.Module | None = None, seed: int = 0) -> FloatModel:
    """Random weights, and an example of three images of 8 x 8."""
    network, generator = network or Denoiser(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    network.eval().requires_grad_(False)
    example = inputs(torch.randn(3, 3, 8, 8, generator=generator), 400)
    return FloatModel(network, example, "toy", ModelSource(source="test"), "other")


def inputs(sample: Tensor, time: float) -> Inputs:
    """A batch at one timestep."""
    return Inputs((), {"sample": sample, "timestep": torch.full((len(sample),), time), "return_dict": False})


def trajectory(count: int = 3, steps: int = len(TIMES), seed: int = 1) -> list[Tensor]:
    """`[count, 3, 8, 8]` for each step: from noise on, less and less different from the step before."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(count, 3, 8, 8, generator=generator)]
    for step in range(1, steps):
        found.append(found[-1] + torch.randn(count, 3, 8, 8, generator=generator) * 0.4 / step)
    return found


class Rows:
    """The rows of recorded trajectories, step by step, as a calibration set."""

    def __init__(self, samples: Sequence[Tensor], times: Sequence[float] = TIMES, *, consecutive: bool = True) -> None:
        self.is_consecutive = consecutive
        self.timesteps = tuple(times)
        self.sample = torch.cat(list(samples))
        self.time = torch.cat([torch.full((len(one),), time) for one, time in zip(samples, times, strict=True)])
        self.steps = torch.cat([torch.full((len(one),), step) for step, one in enumerate(samples)])
        self.images = torch.cat([torch.arange(len(one)) for one in samples])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.sample.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.sample)

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Inputs]:
        chosen = torch.tensor(list(range(len(self)) if indices is None else indices))
        for part in chosen.split(size):
            yield Inputs((), {"sample": self.sample[part], "timestep": self.time[part], "return_dict": False})
