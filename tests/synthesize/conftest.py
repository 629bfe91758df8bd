from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from synthquant.data.preprocess import Preprocess
from synthquant.models.float_model import FloatModel, ModelSource

MakeModel = Callable[..., FloatModel]


class ActivatedBatchNorm(nn.BatchNorm2d):
    """A subclass that does more than normalise, as timm's batch norms do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class TinyNet(nn.Module):
    """Strided main and shortcut branches, in-place ReLU, a subclassed batch norm, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.short = nn.Conv2d(6, 8, 1, stride=2)
        self.bn3 = ActivatedBatchNorm(8)
        self.again = nn.BatchNorm2d(8, affine=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)) + self.bn3(self.short(x)))
        x = self.again(self.again(x) + 0.1)
        return self.fc(x.mean((2, 3)))


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for part in network.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.copy_(torch.randn(part.running_mean.shape, generator=generator) * 0.2)
                part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.3)
    return network


@pytest.fixture
def make_model() -> MakeModel:
    def make(network: nn.Module | None = None, size: tuple[int, int] = (12, 12)) -> FloatModel:
        module = randomize(TinyNet()) if network is None else network
        preprocess = Preprocess(input_size=size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
        return FloatModel(module.eval().requires_grad_(False), preprocess, "tiny", ModelSource(source="zoo/tiny"))

    return make


@pytest.fixture
def tiny(make_model: MakeModel) -> FloatModel:
    return make_model()
