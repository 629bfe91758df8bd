"""Small networks that look at patches, and one that has neither patches nor batch norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthquant.data.preprocess import Preprocess
from synthquant.models.float_model import FloatModel, ModelSource

SIZE = 16
CLASSES = 7


class Tokens(nn.Module):
    """A vision transformer of one block, patches of 4x4 and `prefix` tokens in front, attention written as `form`."""

    def __init__(self, form: str, prefix: int = 1) -> None:
        super().__init__()
        self.form = form
        self.embed = nn.Conv2d(3, 12, 4, 4)
        self.first = nn.Parameter(torch.randn(1, prefix, 12))
        self.qkv = nn.Linear(12, 36)
        self.mixed = nn.MultiheadAttention(12, 3, batch_first=form == "module")
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        added = self.mixed(x, x, x)[0] if self.form == "module" else self.attend(x)
        return self.head((x + added).mean(1))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        if self.form == "fused":
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = self.drop((q @ k.transpose(-2, -1) / 2).softmax(-1, dtype=torch.float32).to(q.dtype))
            out = weights @ v if self.form == "manual" else torch.einsum("bhij,bhjd->bhid", weights, v)
        return out.transpose(1, 2).flatten(2)


class Plain(nn.Module):
    """Neither batch norm nor attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


def float_model(module: nn.Module, name: str, size: int = SIZE, seed: int = 0) -> FloatModel:
    """The module with weights drawn from a seed, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    preprocess = Preprocess(input_size=(size, size), mean=(0.5,) * 3, std=(0.25,) * 3)
    return FloatModel(
        module.eval().requires_grad_(False), preprocess, name, ModelSource(source=name), num_classes=CLASSES
    )
