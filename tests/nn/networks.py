"""Small networks, one for each peculiarity that quantization meets."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from synthquant.data.preprocess import Preprocess
from synthquant.models.float_model import FloatModel, ModelSource


def float_model(network: nn.Module, size: int = 8, seed: int = 0) -> FloatModel:
    """Random weights, random batch-norm statistics, and no preprocessing to speak of."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    preprocess = Preprocess(input_size=(size, size), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    network.eval().requires_grad_(False)
    return FloatModel(network, preprocess, type(network).__name__, ModelSource(source="test"), num_classes=5)


class Block(nn.Module):
    """Residual, with an in-place activation at its end."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.down = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.bn1(self.conv1(x)) + self.down(x))


class Network(nn.Module):
    """Stem, an identity block, a widening block, a classifier; an in-place activation between units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 4), Block(4, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu_(self.stem(x))
        return self.fc(self.blocks(x).mean((2, 3)))


class Upsampling(nn.Module):
    """A long skip connection around a transposed convolution with groups, as in U-Nets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.out = nn.Conv2d(14, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = torch.relu(self.stem(x))
        x = torch.relu(self.middle(torch.relu(self.down(skip))))
        x = self.out(torch.cat([self.up(x), skip], 1))
        return self.fc(torch.relu(x).mean((2, 3)))


class KeywordBlock(nn.Module):
    """Takes several tensors, constants and the batch size, by position and by keyword; gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(
        self, *, x: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor, gain: float, count: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y = self.conv(x) * gate.view(count, 4, 1, 1) * gain + bias + x
        return y, {"pooled": y.mean((2, 3))}


class Keywords(nn.Module):
    """Blocks called by keyword, whose gate comes from a comparison: a way that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([KeywordBlock(), KeywordBlock()])
        self.bias = nn.Parameter(torch.zeros(4, 1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        gate, pooled = (h.mean((2, 3)) > 0).float() + 0.5, []
        for block in self.blocks:
            h, more = block(x=h, gate=gate, bias=self.bias, gain=0.5, count=len(x))
            pooled.append(more["pooled"])
        return self.fc(torch.cat(pooled, 1))


class Encoder(nn.Module):
    """Torch's own encoder layer, which in evaluation mode may run as one fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Normed(nn.Module):
    """Weight norm: the weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)))


class NormedBlock(nn.Module):
    """A transformer's block whose query, key and value are layers of their own, and whose second norm is a function."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.gain, self.offset = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(F.layer_norm(x, x.shape[-1:], self.gain, self.offset))))


class NormedTokens(nn.Module):
    """Layer norms in front of layers in all ways: shared, by a function, with a residual use, before merged patches."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch, self.block = nn.Conv2d(3, width, 4, stride=4), NormedBlock(width)
        self.kept, self.side = nn.LayerNorm(width), nn.Linear(width, width)
        self.merge, self.reduce = nn.LayerNorm(2 * width), nn.Linear(2 * width, width, bias=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.kept(self.block(self.patch(x).flatten(2).transpose(1, 2)))
        x = x + self.side(x)
        x = self.reduce(self.merge(torch.cat([x[:, 0::2], x[:, 1::2]], -1)))
        return self.head(self.norm(x)[:, 0])
