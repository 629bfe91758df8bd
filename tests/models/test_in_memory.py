"""A network from a module in memory: what it takes is said, nothing of the module changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from synthquant.core.errors import ModelError, SynthquantError, UnsupportedModelError
from synthquant.data.preprocess import Preprocess
from synthquant.models.float_model import FloatModel
from synthquant.models.open import open_model
from synthquant.models.signature import Inputs

SIZE = {"input_size": 8, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}


class Net(nn.Module):
    def __init__(self, classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, classes)
        self.norm.num_batches_tracked.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.linear(x) + shift}


def test_a_module_is_copied_and_stays_as_it_is() -> None:
    net = Net().double().train()
    model = FloatModel.from_module(net, **SIZE, class_names="abcde")
    assert net.training and net.conv.weight.dtype == torch.float64 and net.conv.weight.requires_grad
    assert not model.module.training and not model.module.conv.weight.requires_grad
    assert (model.name, model.task, model.num_classes) == ("Net", "classify", 5)
    assert model.class_names == ("a", "b", "c", "d", "e")
    assert model.preprocess.input_size == (8, 8) and model.preprocess.mean == (0.5, 0.4, 0.3)
    net.conv.weight.data.zero_()
    assert bool(model.module.conv.weight.any())


@pytest.mark.parametrize("example", [torch.randn(3, 4), (torch.randn(3, 4),), {"x": torch.randn(3, 4)}])
def test_an_example_says_what_a_network_takes(example: Any) -> None:
    model = FloatModel.from_module(
        nn.Sequential(nn.Linear(4, 2)) if not isinstance(example, dict) else Tensors(), example=example
    )
    assert isinstance(model.takes, Inputs) and len(model.takes) == 3 and model.num_classes == 2


class Tensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_the_task_follows_from_what_it_gives() -> None:
    example = {"x": torch.randn(2, 4), "shift": torch.randn(2, 3)}
    model = FloatModel.from_module(Parts(), example=example, name="parts")
    assert (model.task, model.num_classes, model.name) == ("other", None, "parts")
    assert FloatModel.from_module(Net(), **SIZE, task="other").num_classes is None
    with pytest.raises(UnsupportedModelError, match="returns a dict"):
        FloatModel.from_module(Parts(), example=example, task="classify")


def test_one_number_is_a_square_and_a_channel() -> None:
    model = FloatModel.from_module(Net(channels=1), input_size=9, mean=0.3, std=0.2)
    assert (model.preprocess.input_size, model.preprocess.mean) == ((9, 9), (0.3,))


def test_a_network_of_timm_says_it_itself() -> None:
    timm = pytest.importorskip("timm")
    model = FloatModel.from_module(timm.create_model("test_resnet.r160_in1k"))
    assert model.preprocess.input_size == (160, 160) and model.num_classes == 1000


PREPROCESS = Preprocess(input_size=(8, 8), mean=(0.5,), std=(0.2,))


@pytest.mark.parametrize(
    ("module", "settings", "said"),
    [
        (Net(), {}, r"how its images are prepared; give .*from_module\(module, input_size=..., mean=..., std=...\)"),
        (Net(), {"input_size": 8}, r"from_module\(module, mean=..., std=...\), or an example"),
        (Net(), {**SIZE, "preprocess": PREPROCESS}, "preprocess, input_size, mean, std say twice"),
        (Net(), {"preprocess": PREPROCESS, "example": torch.zeros(1, 3, 8, 8)}, "preprocess, example say twice"),
        (Net(), {"example": "tensor"}, "an example is a tensor, .*; this is a str"),
        (Net(), {"example": torch.zeros(0, 3, 8, 8)}, "has 0 samples"),
        (Net(), {**SIZE, "num_classes": 7}, "gives logits of 5 classes, and num_classes is 7"),
        (Net(), {**SIZE, "class_names": ["a"]}, "1 class_names for a network of 5 classes"),
        (Net(channels=1), SIZE, "takes 1 channel, and mean and std are of 3"),
        (Net(), {**SIZE, "input_size": 1}, r"fails on an image of 1x1 .* \(in Python input_size\)"),
        (torch.jit.script(Net()), SIZE, "TorchScript module"),
        (len, SIZE, "is no torch.nn.Module"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_one_line(module: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SynthquantError, match=said):
        FloatModel.from_module(module, **settings)


def test_such_a_network_cannot_be_opened_by_its_name() -> None:
    with pytest.raises(ModelError, match=r"given in memory .* synthquant.load"):
        open_model(FloatModel.from_module(Net(), **SIZE).source)
