from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthquant.models.batch_norm_loss import image_loss, measure, normalize_and_measure, statistics_loss

SHAPES = [(5, 3), (5, 3, 7), (5, 3, 4, 6), (1, 3, 1, 1), (2, 3, 2, 3, 4)]


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    # A mean far from 0 would show a variance computed as the difference of two large numbers.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 30


def slow_statistics(inputs: Tensor, per_image: bool, epsilon: float) -> Tensor:
    """One channel at a time, in float64, by the definition."""
    batch, channels = inputs.shape[:2]
    groups = [inputs[i : i + 1] for i in range(batch)] if per_image else [inputs]
    rows = []
    for group in groups:
        pairs = []
        for channel in range(channels):
            x = group[:, channel].double().flatten()
            mean = x.sum() / len(x)
            variance = ((x - mean) ** 2).sum() / max(len(x) - 1, 1)
            pairs.append(torch.stack([mean, (variance + epsilon).sqrt()]))
        rows.append(torch.stack(pairs, dim=1))
    return torch.stack(rows, dim=1) if per_image else rows[0]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_measure_equals_the_definition(shape: tuple[int, ...], per_image: bool, channels_last: bool) -> None:
    inputs = values(shape)
    if channels_last and len(shape) == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    inputs.requires_grad_()
    slow_inputs = inputs.detach().double().requires_grad_()
    expected = slow_statistics(slow_inputs, per_image, 1e-3)
    found = measure(inputs, per_image=per_image, epsilon=1e-3)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    weight = values(tuple(found.shape), seed=1)
    (gradient,) = torch.autograd.grad((found * weight).sum(), inputs)
    (slow_gradient,) = torch.autograd.grad((expected * weight).sum(), slow_inputs)
    torch.testing.assert_close(gradient.double(), slow_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("used", ["both", "outputs", "statistics"])
def test_normalize_and_measure_equals_the_plain_layers(shape: tuple[int, ...], per_image: bool, used: str) -> None:
    scale, shift = torch.tensor([0.5, -2.0, 0.0]), torch.tensor([-15.0, 60.0, 1.0])
    inputs = values(shape).requires_grad_()
    slow_inputs = inputs.detach().double().requires_grad_()
    outputs, statistics = normalize_and_measure(inputs, scale, shift, per_image=per_image, epsilon=1e-3)
    broadcast = (1, 3, *[1] * (len(shape) - 2))
    slow_outputs = slow_inputs * scale.double().view(broadcast) + shift.double().view(broadcast)
    slow = slow_statistics(slow_inputs, per_image, 1e-3)
    torch.testing.assert_close(outputs.double(), slow_outputs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(statistics.double(), slow, rtol=1e-5, atol=1e-6)
    by_outputs, by_statistics = values(shape, seed=2), values(tuple(statistics.shape), seed=3)
    fast_sum, slow_sum = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    if used != "statistics":
        fast_sum, slow_sum = fast_sum + (outputs * by_outputs).sum(), slow_sum + (slow_outputs * by_outputs).sum()
    if used != "outputs":
        fast_sum, slow_sum = fast_sum + (statistics * by_statistics).sum(), slow_sum + (slow * by_statistics).sum()
    (gradient,) = torch.autograd.grad(fast_sum, inputs)
    (slow_gradient,) = torch.autograd.grad(slow_sum, slow_inputs)
    torch.testing.assert_close(gradient.double(), slow_gradient, rtol=1e-4, atol=1e-4)


def test_outputs_may_be_changed_in_place() -> None:
    inputs = values((4, 3, 5, 5)).requires_grad_()
    scale, shift = torch.ones(3), torch.full((3,), -30.0)
    outputs, statistics = normalize_and_measure(inputs, scale, shift)
    (gradient,) = torch.autograd.grad(outputs.relu_().sum() + statistics.sum(), inputs)
    slow = inputs.detach().requires_grad_()
    (expected,) = torch.autograd.grad((slow - 30).relu().sum() + measure(slow).sum(), slow)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("per_image", [False, True])
def test_constant_channel_has_finite_gradients(per_image: bool) -> None:
    inputs = torch.full((4, 2, 3, 3), 7.0).requires_grad_()
    statistics = measure(inputs, per_image=per_image)
    (gradient,) = torch.autograd.grad(statistics.sum(), inputs)
    share = 1 / (9 if per_image else 36)
    torch.testing.assert_close(gradient, torch.full_like(gradient, share))


@pytest.mark.parametrize("per_image", [False, True])
def test_half_inputs_have_float32_statistics(per_image: bool) -> None:
    inputs = values((8, 3, 6, 6)).bfloat16().requires_grad_()
    outputs, statistics = normalize_and_measure(inputs, torch.ones(3), torch.zeros(3), per_image=per_image)
    assert outputs.dtype == torch.bfloat16 and statistics.dtype == torch.float32
    expected = slow_statistics(inputs.detach(), per_image, 0.0)
    torch.testing.assert_close(statistics.double(), expected, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(outputs.float().sum() + statistics.sum(), inputs)
    assert gradient.dtype == torch.bfloat16


def test_statistics_loss_of_a_batch_sums_over_channels() -> None:
    statistics, targets = values((2, 4)), values((2, 4), seed=1)
    weights = torch.tensor([1.0, 0.5, 0.25, 2.0])
    expected = sum(float(weights[c]) * float(statistics[k, c] - targets[k, c]) ** 2 for k in range(2) for c in range(4))
    assert float(statistics_loss(statistics, targets, weights)) == pytest.approx(expected, rel=1e-5)


def test_statistics_loss_per_image_is_averaged_over_images() -> None:
    statistics, targets, weights = values((2, 3, 4)), values((2, 4), seed=1), torch.rand(4)
    each = [float(statistics_loss(statistics[:, i], targets, weights)) for i in range(3)]
    assert float(statistics_loss(statistics, targets, weights)) == pytest.approx(sum(each) / 3, rel=1e-5)


def test_image_loss_follows_its_formula() -> None:
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 + 1
    deviation, mean = torch.std_mean(images, [2, 3])
    expected = (mean.norm() ** 2 + (deviation - 1).norm() ** 2) / 4
    torch.testing.assert_close(image_loss(images), expected)
