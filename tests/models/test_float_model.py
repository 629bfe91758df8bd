from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from synthquant.core.errors import UnsupportedModelError
from synthquant.data.preprocess import Preprocess
from synthquant.models import float_model as module_under_test
from synthquant.models.float_model import FloatModel, ModelSource


def preprocess(size: tuple[int, int] = (8, 6)) -> Preprocess:
    return Preprocess(input_size=size, resize=8, crop=True, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")


def float_model(module: nn.Module) -> FloatModel:
    return FloatModel(module, preprocess(), "net", ModelSource(source="net.py:net"))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.register_buffer("steps", torch.tensor(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.mean(dim=(2, 3)))


def test_fingerprint_depends_on_every_entry_of_the_state_and_on_nothing_else() -> None:
    module = Pooled()
    model = float_model(module)
    first = model.fingerprint
    assert first == model.fingerprint == FloatModel(module, preprocess((4, 4)), "other", model.source).fingerprint
    assert len(first) == 64
    with torch.no_grad():
        module.fc.bias[2] += 1e-7
    second = model.fingerprint
    module.steps += 1
    assert len({first, second, model.fingerprint}) == 3


def test_fingerprint_sees_names_and_shapes() -> None:
    values = torch.arange(6.0)
    states = []
    for name, shape in (("a", (2, 3)), ("a", (3, 2)), ("b", (2, 3))):
        module = nn.Module()
        module.register_buffer(name, values.reshape(shape))
        states.append(float_model(module).fingerprint)
    assert len(set(states)) == 3


def test_example_input_is_standard_normal_of_the_input_size_and_repeatable() -> None:
    model = float_model(Pooled())
    images = model.example_images(64)
    assert images.shape == (64, 3, 8, 6)
    assert abs(images.mean().item()) < 0.05
    assert abs(images.std().item() - 1) < 0.05
    state = torch.get_rng_state()
    assert torch.equal(images, model.example_images(64))
    assert not torch.equal(images, model.example_images(64, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_logits_let_gradients_through() -> None:
    images = torch.randn(2, 3, 8, 6, requires_grad=True)
    float_model(Pooled()).logits(images).sum().backward()
    assert images.grad is not None


class Returns(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> object:
        return {"map": images, "tuple": (images.mean(dim=(2, 3)),), "one": images.mean(dim=(0, 2, 3))}[self.kind]


@pytest.mark.parametrize(
    ("kind", "found"), [("map", r"a tensor \[2, 3, 8, 6\]"), ("tuple", "a tuple"), ("one", r"a tensor \[3\]")]
)
def test_logits_of_another_shape_are_refused(kind: str, found: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"net.py:net: the network returns {found} for 2 images"):
        float_model(Returns(kind)).logits(torch.zeros(2, 3, 8, 6))


class Wide(nn.Module):
    """Its largest tensor is not its output."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide, self.pool = nn.Conv2d(3, channels, 1), nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.wide(images)).flatten(1)


# 48 pixels of 4 bytes in each channel.
@pytest.mark.parametrize(("channels", "at_once"), [(1, 64), (10, 64), (11, 32), (90, 4), (500, 1), (10_000, 1)])
def test_fewer_images_go_through_at_once_where_activations_are_large(
    monkeypatch: pytest.MonkeyPatch, channels: int, at_once: int
) -> None:
    monkeypatch.setattr(module_under_test, "_LARGEST_ON_CPU", 64 * 10 * 48 * 4)
    model = float_model(Wide(channels))
    assert model.samples_at_once(64) == at_once
    assert model.samples_at_once(3) == min(3, at_once)
    assert not any(part._forward_hooks for part in model.module.modules())


@pytest.mark.parametrize("channels", [1, 16, 64])
def test_networks_of_the_size_of_cifar_go_through_as_they_are_asked_to(channels: int) -> None:
    model = FloatModel(Wide(channels), preprocess((32, 32)), "net", ModelSource(source="net.py:net"))
    assert model.samples_at_once(128) == 128


def test_to_moves_the_model_and_its_example() -> None:
    model = float_model(Pooled()).to("cpu")
    assert model.device == torch.device("cpu") == model.example_images().device


def test_source_survives_json() -> None:
    source = ModelSource(source="timm/resnet18", input_size=(32, 40), mean=(0.1, 0.2, 0.3), num_classes=7)
    assert ModelSource.model_validate(json.loads(source.model_dump_json())) == source
