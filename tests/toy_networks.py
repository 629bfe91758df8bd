"""Small networks that take and give something else than one batch of colour images and logits, with inputs for each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.models.float_model import FloatModel, ModelSource
from synthquant.models.signature import Inputs


class InMemory:
    """Samples that are all in memory: all that a source of samples needs."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in self.inputs.tensors)).hexdigest()

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Inputs]:
        chosen = torch.tensor(list(range(len(self)) if indices is None else indices))
        for part in chosen.split(size):
            yield self.inputs.filled([tensor[part] for tensor in self.inputs.tensors])


class Conditioned(nn.Module):
    """Features, class numbers, a keyword that is a tree, and a constant that is the same for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.classes = nn.Embedding(10, 8)
        self.mask = nn.Linear(4, 8)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor, number: Tensor, *, extra: dict[str, Tensor], scale: Tensor) -> Tensor:
        x = self.features(x) * scale + self.classes(number)
        return self.out(torch.relu(x + self.mask(extra["mask"])))


class Detector(nn.Module):
    """A dictionary of outputs, one of them a tuple, one of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.boxes, self.far = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.scores = nn.Linear(8, 3)

    def forward(self, image: Tensor) -> dict[str, Any]:
        x = self.stem(image)
        scores = self.scores(x.mean((2, 3)))
        return {"boxes": (self.boxes(x), self.far(x)), "scores": scores, "best": scores.argmax(1)}


class Tokens(nn.Module):
    """Token numbers first; a norm, attention of two heads and a residual connection behind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.norm(x)
        q, k, v = (part(y).unflatten(2, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x)


class TimeBlock(nn.Module):
    """Convolutions with the time added in between."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm = nn.GroupNorm(2, out_channels)
        self.time = nn.Linear(8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = F.silu(self.norm(self.conv1(x))) + self.time(time)[:, :, None, None]
        return self.conv2(y) + self.skip(x)


class UNet(nn.Module):
    """What a diffusion model is made of: an embedding of time steps, and shortcuts that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.down, self.middle, self.up = TimeBlock(4, 4), TimeBlock(4, 8), TimeBlock(12, 4)
        self.out = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, sample: Tensor, step: Tensor) -> Tensor:
        angles = step[:, None].float() * torch.exp(-torch.arange(4.0, device=step.device))
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        first = self.down(self.stem(sample), time)
        x = self.middle(F.avg_pool2d(first, 2), time)
        x = torch.cat([F.interpolate(x, scale_factor=2.0), first], 1)
        return self.out(self.up(x, time))


@dataclass(frozen=True)
class Toy:
    """A network and samples for it."""

    model: FloatModel
    samples: InMemory


def toy(name: str, count: int = 24) -> Toy:
    """Return one of `TOYS` with random weights and random samples, the same on every call."""
    kind = {"conditioned": Conditioned, "detector": Detector, "tokens": Tokens, "unet": UNet}[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind()
        inputs = Inputs(**_inputs(name, count))
        module.train()
        inputs.call(module)  # batch norms see something
    module.eval().requires_grad_(False)
    source, task = ModelSource(source=f"toy/{name}"), "classify" if name == "conditioned" else "other"
    model = FloatModel(module, inputs.rows(0, 4), name, source, task, num_classes=5 if task == "classify" else None)
    return Toy(model, InMemory(inputs))


def _inputs(name: str, count: int) -> dict[str, Any]:
    if name == "conditioned":
        mask = (torch.rand(count, 4) > 0.5).float()
        kwargs = {"extra": {"mask": mask}, "scale": torch.rand(8) + 0.5}
        return {"args": (torch.randn(count, 6), torch.randint(10, (count,))), "kwargs": kwargs, "constants": {"scale"}}
    if name == "detector":
        return {"kwargs": {"image": torch.randn(count, 3, 8, 8)}}
    if name == "tokens":
        return {"args": (torch.randint(12, (count, 5)),)}
    return {"args": (torch.randn(count, 1, 8, 8), torch.randint(1000, (count,)))}


TOYS = ("conditioned", "detector", "tokens", "unet")
