"""Fake quantization against whole numbers, and gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from synthquant.nn.functional import (
    dequantize,
    fake_quantize,
    learned_step_quantize,
    quantize,
    random_keep,
    rectified_sigmoid,
    rectified_sigmoid_inverse,
    rounding_regularizer,
    undecided_share,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "zero_point"), [(2, 1), (4, 8), (4, -3), (8, 128), (16, 30000)])
def test_fake_quantize_against_python_integers(bits: int, zero_point: int) -> None:
    scale = 2.0**-4  # a power of two: every quotient is exact, ties included
    x = torch.cat([normal(500) * 40, (torch.arange(-60, 60) + 0.5) * scale])
    top = 2**bits - 1
    expected_codes, expected = [], []
    for value in x.tolist():
        code = min(max(round(value / scale) + zero_point, 0), top)  # python rounds half to even too
        expected_codes.append(float(code))
        expected.append(scale * (code - zero_point))
    s, z = torch.tensor([scale]), torch.tensor([float(zero_point)])
    before = x.clone()
    assert quantize(x, s, z, top).tolist() == expected_codes
    assert fake_quantize(x, s, z, top).tolist() == expected
    assert dequantize(torch.tensor(expected_codes), s, z).tolist() == expected
    assert torch.equal(x, before)


def surrogate(
    x: torch.Tensor, s: torch.Tensor, x0: torch.Tensor, s0: torch.Tensor, z: torch.Tensor, top: int
) -> torch.Tensor:
    """What the straight-through estimate differentiates: rounding is a fixed offset, clipping is not."""
    offset = torch.round(x0 / s0) - x0 / s0
    codes = torch.round(x0 / s0) + z
    inside = (x / s + offset) * s
    return torch.where(codes < 0, -z * s, torch.where(codes > top, (top - z) * s, inside))


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("zero_point", [0.0, 7.0])
def test_gradients_against_finite_differences(dropping: bool, per_channel: bool, zero_point: float) -> None:
    x0 = normal(5, 6, 7).double()
    s0 = (torch.rand(5, 1, 1, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.1).double()
    s0 = s0 if per_channel else s0[:1, 0, 0]
    z, top = torch.full_like(s0, zero_point), 15
    low, high = -zero_point, top - zero_point
    keep = random_keep(x0, 0.5, torch.Generator().manual_seed(2)) if dropping else None
    weight = normal(5, 6, 7, seed=3).double()

    def loss(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        y = surrogate(x, s, x0, s0, z, top)
        return ((y if keep is None else torch.where(keep > 0, y, x)) * weight).sum()

    x, s = x0.clone().requires_grad_(), s0.clone().requires_grad_()
    y = learned_step_quantize(x, s, low, high, keep, gradient_scale=0.5)
    hard = fake_quantize(x0, s0, z, top)
    assert torch.equal(y, hard if keep is None else torch.where(keep > 0, hard, x0))
    (y * weight).sum().backward()
    assert x.grad is not None and s.grad is not None
    step = 1e-6
    for index in range(s0.numel()):
        bump = torch.zeros_like(s0)
        bump.view(-1)[index] = step
        slope = (loss(x0, s0 + bump) - loss(x0, s0 - bump)) / (2 * step)
        assert float(s.grad.view(-1)[index]) == pytest.approx(0.5 * float(slope), rel=1e-4, abs=1e-4)
    for index in range(0, x0.numel(), 9):
        bump = torch.zeros_like(x0)
        bump.view(-1)[index] = step
        slope = (loss(x0 + bump, s0) - loss(x0 - bump, s0)) / (2 * step)
        assert float(x.grad.view(-1)[index]) == pytest.approx(float(slope), abs=1e-6)


def test_dropped_values_give_the_scale_no_gradient() -> None:
    x, s = normal(100).requires_grad_(), torch.tensor([0.1], requires_grad=True)
    y = learned_step_quantize(x, s, 0.0, 15.0, torch.zeros(100))
    y.sum().backward()
    assert torch.equal(y, x)
    assert s.grad is not None and abs(float(s.grad)) < 1e-3
    assert x.grad is not None and torch.equal(x.grad, torch.ones(100))


def test_gradients_do_not_depend_on_the_memory_layout() -> None:
    x, weight = normal(4, 6, 5, 3), normal(4, 6, 5, 3, seed=1)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for weight_layout in (torch.contiguous_format, torch.channels_last):
            s = torch.tensor([0.2], requires_grad=True)
            y = learned_step_quantize(x.to(memory_format=layout), s, -3.0, 12.0)
            y.backward(weight.to(memory_format=weight_layout))
            assert s.grad is not None
            found.append(float(s.grad))
    assert found == pytest.approx([found[0]] * 4, rel=1e-4)


def test_gradients_that_nobody_asked_for_are_not_made() -> None:
    s = torch.tensor([0.1], requires_grad=True)
    learned_step_quantize(normal(10), s, 0.0, 15.0).sum().backward()
    assert s.grad is not None
    x = normal(10).requires_grad_()
    learned_step_quantize(x, s.detach(), 0.0, 15.0).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.5, 0.9])
def test_random_keep_probability(probability: float) -> None:
    mask = random_keep(torch.empty(200, 1001), probability, torch.Generator().manual_seed(0))
    assert mask.shape == (200, 1001) and set(mask.unique().tolist()) == {0.0, 1.0}
    deviation = math.sqrt(probability * (1 - probability) / mask.numel())
    assert float(mask.mean()) == pytest.approx(probability, abs=1 / 512 + 5 * deviation)
    # Neighbours share a random number and must not follow one another.
    together = float((mask[:, :-1] * mask[:, 1:]).mean())
    assert together == pytest.approx(probability**2, abs=0.01)


@pytest.mark.parametrize("probability", [0.999, 1.0])
def test_random_keep_keeps_all(probability: float) -> None:
    assert bool(random_keep(torch.empty(3, 1000), probability, torch.Generator()).all())


def test_random_keep_follows_the_memory_layout() -> None:
    plain = torch.empty(2, 5, 3, 7)
    assert random_keep(plain.bfloat16(), 0.5, torch.Generator()).dtype == torch.bfloat16
    for like in (plain, plain.to(memory_format=torch.channels_last), plain.transpose(1, 3), torch.empty(()), plain[:0]):
        mask = random_keep(like, 0.5, torch.Generator().manual_seed(0))
        assert mask.shape == like.shape and mask.stride() == like.stride() and mask.dtype == like.dtype
    part = torch.empty(4, 8)[:, ::2]  # not dense: any layout will do
    assert random_keep(part, 0.5, torch.Generator()).shape == part.shape


def test_random_keep_depends_on_the_generator_only() -> None:
    like = torch.empty(1000)
    first, again = (random_keep(like, 0.5, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, random_keep(like, 0.5, torch.Generator().manual_seed(6)))


def test_rectified_sigmoid_and_its_inverse() -> None:
    fractions = torch.cat([torch.linspace(0, 1, 1001)[:-1], torch.tensor([1 - 2**-24, 1.0])])
    logits = rectified_sigmoid_inverse(fractions)
    assert bool(logits.isfinite().all()) and float(logits.abs().max()) < 2.41
    assert torch.allclose(rectified_sigmoid(logits), fractions, atol=1e-6)
    assert torch.equal(logits >= 0, fractions >= 0.5)


def test_regularizer_is_zero_once_decided_and_counts_the_undecided() -> None:
    assert float(rounding_regularizer(torch.tensor([0.0, 1.0, 1.0]), 2.0)) == 0
    assert float(rounding_regularizer(torch.full((7,), 0.5), 20.0)) == 7
    # Eq. 24 in between: 1 - |2h - 1|**beta of either side, and the exponent as it is.
    between = rounding_regularizer(torch.tensor([0.25, 0.75, 0.1]), 3.0)
    assert float(between) == pytest.approx((1 - 0.5**3) * 2 + 1 - 0.8**3, rel=1e-5)
    soft = torch.full((3,), 0.5, requires_grad=True)
    rounding_regularizer(soft, 2.0).backward()
    assert soft.grad is not None and torch.equal(soft.grad, torch.zeros(3))
    assert undecided_share(torch.tensor([0.0, 0.5, 0.97, 1.0])) == 0.5
    assert undecided_share(torch.empty(0)) == 0.0
