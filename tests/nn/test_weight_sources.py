from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.small_networks import calibrated_model, small_float_model, small_images
from torch import Tensor

from synthquant.core.rng import Rng
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.weight_quantizers import WeightLayout, WeightQuantizer
from synthquant.nn.weight_sources import CodeOffsets, LearnedStep
from synthquant.quantize import GenieM


def quantizer_of(weight: Tensor, bits: int = 3, *, symmetric: bool = True) -> WeightQuantizer:
    args = QuantArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    quantizer = WeightQuantizer(WeightLayout(tuple(weight.shape)), args)
    quantizer.calibrate(weight, "genie")
    return quantizer


@pytest.fixture
def weight() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 3, 3, generator=generator) * torch.tensor([0.01, 0.3, 1.0, 20.0]).view(4, 1, 1, 1)


def gradients(source: LearnedStep | CodeOffsets, toward: Tensor) -> tuple[Tensor, Tensor]:
    loss = (source.compute() * toward).sum()
    found = torch.autograd.grad(loss, [source.learned, source.factor])
    return found[0], found[1]


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_of_lsq_are_those_of_its_surrogate(weight: Tensor, symmetric: bool) -> None:
    """Rounding is a constant that is added: the difference quotients of that function, in float64, are the gradient."""
    quantizer = quantizer_of(weight * 1.5, symmetric=symmetric)  # some weights lie beyond the grid
    quantizer.scale.mul_(0.7)
    source = LearnedStep(quantizer, weight * 1.5, lsq_gradient_scale=False)
    toward = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    of_weight, of_factor = gradients(source, toward)

    ratio, start = source.ratio.detach().double(), source.start.double()
    zero, top, wanted = quantizer.zero_point.double(), quantizer.args.quant_max, quantizer.grouped(toward).double()
    added = ratio.round() - ratio
    inside = ((ratio.round() + zero) >= 0) & ((ratio.round() + zero) <= top)

    def surrogate(moved: Tensor, factor: Tensor) -> Tensor:
        codes = torch.where(inside, moved / factor + added + zero, (ratio.round() + zero).clamp(0, top))
        return ((codes - zero) * start * factor * wanted).sum((1, 2))

    one, step = torch.ones_like(start), 1e-4
    numeric = (surrogate(ratio, one + step) - surrogate(ratio, one - step)) / (2 * step)
    torch.testing.assert_close(of_factor.flatten().double(), numeric, rtol=1e-4, atol=1e-4)
    assert 0 < inside.double().mean() < 1
    expected = torch.where(inside, wanted * start, torch.zeros_like(wanted))
    torch.testing.assert_close(of_weight.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [LearnedStep, CodeOffsets])
def test_the_gradient_of_a_step_is_scaled_by_the_weights_that_share_it(weight: Tensor, kind: type) -> None:
    quantizer = quantizer_of(weight)
    arguments = (quantizer, weight) if kind is LearnedStep else (quantizer,)
    toward = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    plain = gradients(kind(*arguments, lsq_gradient_scale=False), toward)
    scaled = gradients(kind(*arguments), toward)
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], plain[1] / (27 * 3) ** 0.5)  # Q_P of three signed bits is 3


@pytest.mark.parametrize("unclipped", [False, True])
def test_offsets_start_at_the_network_that_learned_its_steps_bit_for_bit(tmp_path: Path, unclipped: bool) -> None:
    model = QuantModel.build(small_float_model(tmp_path), "W2A4")
    method = GenieM(iterations=30, batch_size=4, weight_scale_lr=0.05, unclipped_codes=unclipped)
    method.apply(model, small_images(), Rng(0))
    beyond = 0
    for name, layer in model.layers.items():
        assert layer.weight_quantizer is not None
        decoded = layer.weight.clone()
        layer.weight_source = CodeOffsets(layer.weight_quantizer)
        assert torch.equal(layer.weight, decoded), name
        codes = layer.weight_quantizer.codes
        beyond += int(((codes < 0) | (codes > layer.weight_quantizer.args.quant_max)).sum()) if unclipped else 0
        layer.harden_weight(unclipped=unclipped)
        assert torch.equal(layer.weight_quantizer.codes, codes) and torch.equal(layer.weight, decoded)
    assert not unclipped or beyond > 0


def test_offsets_round_back_onto_the_grid_from_beyond_it(weight: Tensor) -> None:
    quantizer = quantizer_of(weight)
    quantizer.set_codes(quantizer.grouped(quantizer.codes).short() + 9, unclipped=True)
    source = CodeOffsets(quantizer)
    top = source.compute().detach().clone()
    with torch.no_grad():
        source.offset -= 9.4
    quantizer.set_codes(quantizer.grouped(quantizer.codes) - 9)
    assert not torch.equal(source.compute(), top)
    torch.testing.assert_close(source.compute(), quantizer())


def test_whole_steps_of_an_offset_are_steps_of_the_present_scale(weight: Tensor) -> None:
    """`round(u / s)` is of the step that is learned, not of the one at the start."""
    quantizer = quantizer_of(weight)
    source = CodeOffsets(quantizer)
    with torch.no_grad():
        source.offset.fill_(0.4)
        source.factor.fill_(0.5)
    codes, scale = source.decided()
    assert torch.equal(codes, quantizer.grouped(quantizer.codes) + 1) and torch.equal(scale, quantizer.scale * 0.5)


def test_lsq_starts_at_nearest_rounding(tmp_path: Path) -> None:
    model = calibrated_model(small_float_model(tmp_path), "W3A4")
    for layer in model.layers.values():
        assert layer.weight_quantizer is not None
        decoded = layer.weight.clone()
        layer.weight_source = LearnedStep(layer.weight_quantizer, layer.float_weight)
        torch.testing.assert_close(layer.weight, decoded)
