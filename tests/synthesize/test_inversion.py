from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.core.modules import hooked
from synthquant.core.progress import Bar
from synthquant.methods import SYNTHESIZERS
from synthquant.models.float_model import FloatModel
from synthquant.synthesize.inversion import (
    Advice,
    ExponentialSchedule,
    InvertedNetwork,
    Learner,
    PlateauSchedule,
    adam,
    invert,
)

MakeModel = Callable[..., FloatModel]


def slow_loss(network: nn.Module, images: Tensor, per_image: bool, mean_of_channels: bool, epsilon: float) -> Tensor:
    """Forward hooks and one layer at a time, as the papers write it."""
    inputs: list[tuple[nn.BatchNorm2d, Tensor]] = []
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]

    def keep(module: nn.BatchNorm2d, args: tuple[Tensor, ...]) -> None:
        inputs.append((module, args[0]))

    with hooked(pre=[(norm, keep) for norm in norms]):
        network(images)
    total = torch.zeros(())
    for norm, x in inputs:
        assert norm.running_mean is not None and norm.running_var is not None
        target = (norm.running_var + 1e-6).sqrt()
        dims = [2, 3] if per_image else [0, 2, 3]
        deviation = (x.var(dims) + epsilon).sqrt()
        gaps = (x.mean(dims) - norm.running_mean) ** 2 + (deviation - target) ** 2
        of_layer = gaps.sum(-1).mean()
        total = total + (of_layer / x.shape[1] if mean_of_channels else of_layer)
    of_images = images.mean((2, 3)) ** 2 + ((images.var((2, 3)) + epsilon).sqrt() - 1) ** 2
    return total + of_images.sum(1).mean()


def inverted(model: FloatModel, statistics: Literal["batch", "image"] = "batch", **options: object) -> InvertedNetwork:
    settings: dict[str, object] = {"channel_weights": "mean", "swing": False} | options
    return InvertedNetwork(model, method="genie_d", statistics=statistics, untrained=True, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("statistics", ["batch", "image"])
@pytest.mark.parametrize("channel_weights", ["mean", "sum"])
def test_loss_and_gradient_equal_the_slow_way(
    tiny: FloatModel, statistics: Literal["batch", "image"], channel_weights: str
) -> None:
    network = inverted(tiny, statistics, channel_weights=channel_weights, epsilon=1e-6)
    for seed in (0, 1):
        images = tiny.example_images(4, seed).requires_grad_()
        loss = network.loss(images)
        expected = slow_loss(tiny.module, images, statistics == "image", channel_weights == "mean", 1e-6)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        (gradient,) = torch.autograd.grad(loss, images)
        (slow_gradient,) = torch.autograd.grad(expected, images)
        torch.testing.assert_close(gradient, slow_gradient, rtol=1e-3, atol=1e-5)


def test_loss_of_timm_batch_norms_equals_the_slow_way(make_model: MakeModel) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = make_model(timm.create_model("efficientnet_lite0", pretrained=False), (64, 64))
    images = model.example_images(2)
    loss = inverted(model).loss(images)
    torch.testing.assert_close(loss, slow_loss(model.module, images, False, True, 0.0), rtol=1e-4, atol=1e-4)


def test_float_model_is_untouched(tiny: FloatModel) -> None:
    before = tiny.fingerprint
    kinds = [type(part) for part in tiny.module.modules()]
    network = inverted(tiny, swing=True)
    assert network.swing is not None
    network.swing.draw(torch.Generator().manual_seed(0))
    images = tiny.example_images().requires_grad_()
    network.loss(images).backward()
    assert tiny.fingerprint == before
    assert [type(part) for part in tiny.module.modules()] == kinds
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in tiny.module.modules())
    assert all(parameter.grad is None for parameter in tiny.module.parameters())
    layout = next(iter(tiny.module.parameters()))
    assert layout.is_contiguous()


def test_swing_offset_changes_the_loss_and_the_middle_one_does_not(tiny: FloatModel) -> None:
    images = tiny.example_images()
    plain, swung = inverted(tiny), inverted(tiny, swing=True)
    torch.testing.assert_close(plain.loss(images), swung.loss(images))
    assert swung.swing is not None
    swung.swing.offsets.fill_(0)
    assert float(plain.loss(images)) != pytest.approx(float(swung.loss(images)), rel=1e-3)


def test_bfloat16_loss_is_close(tiny: FloatModel) -> None:
    images = tiny.example_images(8)
    exact, rough = inverted(tiny).loss(images), inverted(tiny, compute_dtype="bfloat16").loss(images)
    assert rough.dtype == torch.float32
    assert float(rough) == pytest.approx(float(exact), rel=0.02)
    assert float(rough) != float(exact)


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(3, 4, 1)),
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    ],
)
def test_network_without_batch_norm_names_what_works(make_model: MakeModel, network: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        inverted(make_model(network))
    message = str(error.value)
    assert "tiny has no batch norm with running statistics, which genie_d needs" in message
    named = message.split(": ")[-1].split(", ")
    assert "noise" in named and not {"zeroq", "genie_d"} & set(named)
    assert set(named) <= set(SYNTHESIZERS.names())


def test_batch_norm_that_never_runs_is_no_batch_norm(make_model: MakeModel) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    model = make_model(Unused())
    with pytest.raises(UnsupportedModelError, match="no batch norm"):
        inverted(model).loss(model.example_images())


@pytest.mark.parametrize("patience", [0, 2, 5])
def test_plateau_schedule_equals_torch(patience: int) -> None:
    generator = torch.Generator().manual_seed(patience)
    losses = (torch.rand(200, generator=generator) * torch.linspace(2, 1, 200)).tolist()
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    reference = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=1e-4, patience=patience)
    rate = torch.tensor(0.1)
    schedule = PlateauSchedule(rate, patience=patience)
    for iteration, loss in enumerate(losses, start=1):
        reference.step(loss)
        schedule.step(torch.tensor(loss), iteration)
        assert float(rate) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5)
    assert float(rate) == pytest.approx(1e-4)


def test_exponential_schedule_falls_after_every_few_iterations() -> None:
    rate = torch.tensor(1.0)
    schedule = ExponentialSchedule(rate, factor=0.5, every=3)
    rates = []
    for iteration in range(1, 8):
        schedule.step(torch.tensor(0.0), iteration)
        rates.append(float(rate))
    assert rates == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_schedule_drives_the_optimizer() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer, rate = adam([parameter], 0.5)
    assert optimizer.param_groups[0]["lr"] is rate
    rate.fill_(0.25)
    parameter.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), -0.25))


def run(model: FloatModel, pixels: Tensor, iterations: int, rate: float, bar: Bar) -> Tensor:
    optimizer, learning_rate = adam([pixels], rate)
    return invert(
        inverted(model),
        lambda: pixels,
        [Learner(optimizer, PlateauSchedule(learning_rate))],
        iterations=iterations,
        swing_generator=torch.Generator(),
        advice=Advice(3, f"pixel_lr (now {rate:g})"),
        bar=bar,
    )


@pytest.mark.parametrize("iterations", [1, 30, 50, 130])
def test_bar_counts_every_iteration_and_shows_the_loss(tiny: FloatModel, iterations: int) -> None:
    bar = Bar("test", iterations)
    run(tiny, tiny.example_images().requires_grad_(), iterations, 0.1, bar)
    assert bar.done == iterations
    assert math.isfinite(float(bar.fields["loss"]))


def test_loss_falls(tiny: FloatModel) -> None:
    pixels = tiny.example_images(4).requires_grad_()
    before = float(inverted(tiny).loss(pixels).detach())
    run(tiny, pixels, 100, 0.05, Bar("test", 100))
    assert float(inverted(tiny).loss(pixels).detach()) < 0.8 * before


def test_loss_that_becomes_infinite_names_batch_and_setting(tiny: FloatModel) -> None:
    pixels = tiny.example_images().requires_grad_()
    with pytest.raises(InputError, match=r"loss of batch 3 is .* at iteration 50; lower pixel_lr \(now 1e\+30\)"):
        run(tiny, pixels, 200, 1e30, Bar("test", 200))


def test_loss_that_starts_infinite_points_at_the_network(tiny: FloatModel) -> None:
    tiny.module.get_submodule("bn2").get_buffer("running_mean").fill_(math.nan)
    pixels = tiny.example_images().requires_grad_()
    with pytest.raises(InputError, match="loss of batch 3 is nan before the first step; check the network's weights"):
        run(tiny, pixels, 10, 0.1, Bar("test", 10))


class FrozenByHand(nn.Module):
    """Reads the statistics of its batch norm; `calls` says whether it runs the module too."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 5)
        self.calls = calls

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images - self.bn.running_mean[:, None, None]) / (self.bn.running_var[:, None, None] + self.bn.eps).sqrt()
        x = self.bn(x) if self.calls else x
        return self.fc(x.mean((2, 3)))


def test_a_forward_may_read_the_numbers_of_its_batch_norms(make_model: MakeModel) -> None:
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "method": "genie_d",
        "statistics": "batch",
        "channel_weights": "mean",
        "swing": False,
        "untrained": True,
    }
    network = InvertedNetwork(make_model(FrozenByHand(calls=True)), **options)
    assert bool(torch.isfinite(network.loss(images)))
    blind = InvertedNetwork(make_model(FrozenByHand(calls=False)), **options)
    with pytest.raises(UnsupportedModelError, match="no batch norm runs as a module"):
        blind.loss(images)
