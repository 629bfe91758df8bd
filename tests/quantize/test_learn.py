"""Soft rounding, batches, losses and the optimisation loop of one unit."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import islice

import pytest
import torch
from tests.quantize.phases import a_phase
from torch import nn

from synthquant.core.rng import Rng
from synthquant.nn.activation_quantizers import ActivationQuantizer
from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.layers import QuantLayer, quantize_layer, weight_layout
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.weight_quantizers import WeightQuantizer
from synthquant.nn.weight_sources import SoftRounding
from synthquant.quantize.learn import (
    Learnable,
    Phase,
    Sampling,
    batches,
    beta_at,
    learn_unit,
    reconstruction_error,
)

CPU = torch.device("cpu")
KINDS: dict[str, nn.Module] = {
    "conv": nn.Conv2d(4, 6, 3),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
    "linear": nn.Linear(12, 6),
}


def layer_of(
    kind: str = "linear", observer: str = "genie", inputs: ActivationQuantizer | None = None, **args: object
) -> QuantLayer:
    module = copy.deepcopy(KINDS[kind]).requires_grad_(False)
    assert isinstance(module.weight, nn.Parameter)
    weight = module.weight.data
    weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    module.register_parameter("bias", None)
    fields = {"num_bits": 3, "strategy": "channel", **args}
    quantizer = WeightQuantizer(weight_layout(module), QuantArgs(**fields))  # type: ignore[arg-type]
    quantizer.calibrate(weight, observer)
    return quantize_layer(module, quantizer, inputs)


def quantizer_of(layer: QuantLayer) -> WeightQuantizer:
    assert layer.weight_quantizer is not None
    return layer.weight_quantizer


def soft_rounding(layer: QuantLayer, learn_scale: bool = True) -> SoftRounding:
    source = SoftRounding(quantizer_of(layer), layer.float_weight, learn_scale)
    layer.weight_source = source
    return source


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("args", [{}, {"symmetric": True}, {"strategy": "tensor"}, {"num_bits": 8}])
def test_soft_weights_start_as_the_clipped_float_weights(kind: str, args: dict[str, object]) -> None:
    layer = layer_of(kind, **args)
    quantizer = quantizer_of(layer)
    grouped = quantizer.grouped(layer.float_weight)
    low = -quantizer.zero_point * quantizer.scale
    high = (quantizer.args.quant_max - quantizer.zero_point) * quantizer.scale
    soft_rounding(layer)
    assert torch.allclose(layer.weight, quantizer.ungrouped(grouped.clamp(low, high)), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_hard_rounding_at_the_start_is_rounding_to_nearest(kind: str) -> None:
    layer = layer_of(kind)
    quantizer = quantizer_of(layer)
    nearest = quantizer.codes.clone()
    soft_rounding(layer)
    layer.harden_weight()
    assert torch.equal(quantizer.codes, nearest)
    assert layer.weight_source is None


def test_a_source_is_part_of_the_network_and_holds_one_weight_for_a_step() -> None:
    network = nn.Sequential(layer_of("linear"))
    (layer,) = network
    assert isinstance(layer, QuantLayer)
    before = layer.weight
    soft = soft_rounding(layer)
    assert {name for name, one in network.named_parameters() if one.requires_grad} == {
        "0.weight_source.logit",
        "0.weight_source.factor",
    }
    assert "0.weight_source.logit" in network.state_dict()
    copied = copy.deepcopy(network)
    with torch.no_grad():
        soft.logit.add_(3)
    assert not torch.equal(layer.weight, copied[0].weight) and layer.weight is not layer.weight
    soft.hold()
    assert layer.weight is layer.weight
    layer.weights_enabled = False
    assert layer.weight is layer.float_weight
    layer.weights_enabled, layer.weight_source = True, None
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_unclipped_codes_compute_the_same_and_remember_what_was_cut_off(kind: str) -> None:
    clipped, unclipped = layer_of(kind, num_bits=2), layer_of(kind, num_bits=2)
    for layer, keep in ((clipped, False), (unclipped, True)):
        soft_rounding(layer)
        layer.harden_weight(unclipped=keep)
    own, other = quantizer_of(unclipped), quantizer_of(clipped)
    assert own.unclipped and own.codes.dtype == torch.int16 and not other.unclipped and other.codes.dtype == torch.uint8
    assert int(own.codes.min()) < 0 or int(own.codes.max()) > 3
    assert torch.equal(own.clipped_codes, other.codes) and torch.equal(unclipped.weight, clipped.weight)
    nearest = torch.floor(own.grouped(unclipped.float_weight) / own.scale + 0.5) + own.zero_point
    assert torch.equal(own.grouped(own.codes).float(), nearest)


def test_ties_are_rounded_up() -> None:
    layer = layer_of("linear", num_bits=4)
    quantizer = quantizer_of(layer)
    quantizer.scale.fill_(0.5)
    quantizer.zero_point.fill_(8)
    weight = layer.float_weight
    weight.copy_((torch.arange(weight.numel()).view_as(weight) % 14 - 7 + 0.5) * 0.5)
    soft_rounding(layer, learn_scale=False)
    layer.harden_weight()
    assert torch.equal(quantizer.codes.float(), torch.floor(weight / 0.5) + 1 + 8)


def test_gradient_of_the_weight_scale_s_factor_is_the_clipped_code_less_its_zero_point() -> None:
    layer = layer_of("grouped")
    quantizer = quantizer_of(layer)
    soft = soft_rounding(layer)
    with torch.no_grad():
        soft.logit.add_(torch.randn(soft.logit.shape, generator=torch.Generator().manual_seed(1)))
        soft.factor.mul_(1.3)  # the integer part does not move with it
    soft.hold()
    share = soft.soft
    outer = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2))
    (layer.weight * outer).sum().backward()
    ratio = quantizer.grouped(layer.float_weight) / quantizer.scale
    codes = torch.clamp(ratio.floor() + share + quantizer.zero_point, 0, quantizer.args.quant_max)
    wanted = quantizer.scale * ((codes - quantizer.zero_point) * quantizer.grouped(outer)).sum(2, keepdim=True)
    assert soft.factor.grad is not None and torch.allclose(soft.factor.grad, wanted, rtol=1e-5, atol=1e-5)
    inside = (ratio.floor() + share + quantizer.zero_point - codes).detach() == 0
    assert soft.logit.grad is not None and bool((soft.logit.grad[~inside] == 0).all())


def test_a_fixed_scale_takes_no_gradient_and_undecided_leaves_clipped_weights_out() -> None:
    layer = layer_of("linear", num_bits=2)
    soft = soft_rounding(layer, learn_scale=False)
    layer.weight.sum().backward()
    assert soft.factor.grad is None and soft.logit.grad is not None
    quantizer = quantizer_of(layer)
    base = torch.floor(quantizer.grouped(layer.float_weight) / quantizer.scale) + quantizer.zero_point
    assert len(soft.undecided()) == int(((base >= 0) & (base < 3)).sum()) < layer.float_weight.numel()


@pytest.mark.parametrize("sampling", ["epoch", "permutation", "replacement"])
def test_batches(sampling: Sampling) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = list(islice(batches(10, 4, sampling, generator), 5))
    assert all(len(batch) == 4 and int(batch.min()) >= 0 and int(batch.max()) < 10 for batch in drawn)
    if sampling != "replacement":
        assert all(len(set(batch.tolist())) == 4 for batch in drawn[:2])
    if sampling == "epoch":  # 5 batches of 4 are two epochs of 10
        assert set(Counter(torch.cat(drawn).tolist()).values()) == {2}
    again = list(islice(batches(10, 4, sampling, torch.Generator().manual_seed(0)), 5))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))


@pytest.mark.parametrize("sampling", ["epoch", "permutation"])
def test_batches_of_fewer_images_than_asked_for(sampling: Sampling) -> None:
    for batch in islice(batches(3, 8, sampling, torch.Generator()), 4):
        assert sorted(batch.tolist()) == [0, 1, 2]


def test_error_is_summed_over_channels_and_averaged_over_the_rest() -> None:
    y, wanted = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    by_channel = (y - wanted).square().sum(1).mean()
    assert torch.allclose(reconstruction_error([y], [wanted], False, 2.0), by_channel)
    tokens = (y - wanted).square().sum(-1).mean()
    assert torch.allclose(reconstruction_error([y], [wanted], True, 2.0), tokens)
    logits = reconstruction_error([y[:, :, 0, 0]], [wanted[:, :, 0, 0]], True, 2.0)
    assert torch.allclose(logits, (y - wanted)[:, :, 0, 0].square().sum(1).mean())
    powered = (y - wanted).abs().pow(2.4).sum(1).mean()
    assert torch.allclose(reconstruction_error([y], [wanted], False, 2.4), powered)
    mask = torch.ones(2, dtype=torch.bool)
    both = reconstruction_error([y, mask, y], [wanted, ~mask, wanted], False, 2.0)
    assert torch.allclose(both, 2 * by_channel)


def test_channels_of_sequences_and_of_numbers() -> None:
    y, wanted = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    assert torch.allclose(reconstruction_error([y], [wanted], False, 2.0), (y - wanted).square().sum(1).mean())
    assert torch.allclose(reconstruction_error([y], [wanted], True, 2.0), (y - wanted).square().sum(2).mean())
    one, other = y[:, 0, 0], wanted[:, 0, 0]
    assert torch.allclose(reconstruction_error([one], [other], False, 2.0), (one - other).square().mean())


def test_fisher_weighting() -> None:
    """BRECQ (arXiv:2102.05426): sum(g^2 dy^2), or (sum |dy| |g|)^2 of each image; of the first tensor only."""
    y, wanted, g = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4) + 1
    diagonal = ((y - wanted).square() * g.square()).sum(1).mean()
    assert torch.allclose(reconstruction_error([y], [wanted], False, 2.0, g), diagonal)
    full = ((y - wanted).abs() * g).sum((1, 2, 3)).square().mean() * 3 / (3 * 4 * 4) ** 2
    assert torch.allclose(reconstruction_error([y], [wanted], False, 2.0, g, full=True), full)
    pooled, mean = y.mean((2, 3)), wanted.mean((2, 3))
    both = reconstruction_error([y, pooled], [wanted, mean], False, 2.0, g)
    assert torch.allclose(both, diagonal + (pooled - mean).square().sum(1).mean())


@pytest.mark.parametrize("full", [False, True])
def test_fisher_weighting_leaves_the_size_of_the_error(full: bool) -> None:
    """So that the regulariser keeps its own: weights of one size change nothing, and so do errors proportional to g."""
    g = torch.rand(2, 3, 4, 4) + 0.5
    g /= g.square().mean().sqrt()
    zero, one = torch.zeros_like(g), torch.ones_like(g)
    plain = reconstruction_error([one], [zero], False, 2.0)
    assert torch.allclose(reconstruction_error([one], [zero], False, 2.0, one, full), plain)
    found = reconstruction_error([one if not full else g], [zero], False, 2.0, g, full)
    assert torch.allclose(found, plain if not full else g.square().mean((1, 2, 3)).square().mean() * 3)


def test_annealing() -> None:
    phase = a_phase(iterations=1000)
    found = [beta_at(step, phase) for step in (1, 200, 600, 1000)]
    assert found == pytest.approx([20.0, 20.0, 11.0, 2.0])


def problem(phase: Phase, ticks: list[int] | None = None, seed: int = 0) -> tuple[float, float, QuantLayer, float]:
    """Fit a linear layer at 2 bits; gives its error before and after, the layer, and the undecided share."""
    inputs = AffineQuantizer(QuantArgs(num_bits=4))
    inputs.set_grid(torch.tensor([0.4]), torch.tensor([8.0]))
    layer = layer_of("linear", inputs=inputs, num_bits=2)
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(3))
    x[:, 1:] += x[:, :1]  # correlated inputs are what makes learned rounding better than nearest
    wanted = x @ layer.float_weight.T

    def error_of(batch: torch.Tensor) -> torch.Tensor:
        return reconstruction_error([layer(x[batch])], [wanted[batch]], True, phase.norm)

    def total() -> float:
        with torch.no_grad():
            return float(error_of(torch.arange(64)))

    inputs.enabled = phase.activations
    before = total()

    def tick(step: int, loss: float | None) -> None:
        if ticks is not None and loss is not None:
            ticks.append(step)

    learned = learn_unit(phase, Learnable([layer], [inputs], error_of, 64, CPU), Rng(seed), tick)
    assert not inputs.learning and inputs.quantize_probability == 1.0 and not inputs.scale.requires_grad
    return before, total(), layer, learned.undecided if learned.undecided is not None else -1.0


def weights_phase(**changes: object) -> Phase:
    return a_phase(**{"rounding_lr": 0.2, "rounding_weight": 10.0, "sampling": "epoch", **changes})


def test_learned_rounding_beats_nearest_and_annealing_decides() -> None:
    ticks: list[int] = []
    before, after, layer, undecided = problem(weights_phase(), ticks)
    assert after < 0.7 * before
    assert undecided < 0.05
    codes = quantizer_of(layer).codes
    assert int(codes.max()) <= 3 and ticks[0] == 1 and ticks[-1] == 200 and len(ticks) < 200
    *_, open_ended = problem(weights_phase(rounding_weight=0.0))
    assert open_ended > 5 * undecided


def test_scales_learn_only_where_asked() -> None:
    fixed = quantizer_of(layer_of("linear", num_bits=2)).scale
    assert torch.equal(quantizer_of(problem(weights_phase())[2]).scale, fixed)
    learned = quantizer_of(problem(weights_phase(weight_scale_lr=1e-3))[2]).scale
    assert not torch.equal(learned, fixed) and bool((learned > 0).all())


def test_activation_steps_alone() -> None:
    phase = a_phase(
        inputs="teacher", activations=True, rounding_lr=0.0, activation_scale_lr=1e-2, norm=2.4, sampling="epoch"
    )
    before, after, layer, undecided = problem(phase)
    assert after < before and undecided == -1.0
    assert torch.equal(quantizer_of(layer).codes, quantizer_of(layer_of("linear", num_bits=2)).codes)
    assert layer.input_quantizer is not None and float(layer.input_quantizer.scale) != pytest.approx(0.4)


def test_same_seed_same_result() -> None:
    phase = weights_phase(
        iterations=30, activations=True, activation_scale_lr=1e-3, quantize_probability=0.5, weight_scale_lr=1e-3
    )
    first, again, other = (problem(phase, seed=seed)[2] for seed in (0, 0, 1))
    assert torch.equal(quantizer_of(first).scale, quantizer_of(again).scale)
    assert not torch.equal(quantizer_of(first).scale, quantizer_of(other).scale)


def test_keeping_all_with_fixed_weight_scales_is_qdrop_without_dropping() -> None:
    """Genie-M differs from QDrop in the weight scales, the LSQ factor and the sampling only."""
    shared = {"iterations": 20, "activations": True, "activation_scale_lr": 1e-3, "quantize_probability": 1.0}
    genie = problem(weights_phase(**shared, weight_scale_lr=0.0))
    plain = problem(weights_phase(**shared))
    assert genie[1] == plain[1]
    scaled = problem(weights_phase(**shared, lsq_gradient_scale=True))
    assert genie[1] == pytest.approx(scaled[1], rel=1e-2), "Adam undoes a constant factor on a gradient"


def test_an_interrupted_unit_leaves_no_soft_weights_behind() -> None:
    layer = layer_of("linear")
    codes = quantizer_of(layer).codes.clone()

    def stop(step: int, loss: float | None) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unit = Learnable([layer], [], lambda _: layer.weight.square().sum(), 8, CPU)
        learn_unit(weights_phase(), unit, Rng(0), stop)
    assert layer.weight_source is None and torch.equal(quantizer_of(layer).codes, codes)


def test_nothing_to_learn() -> None:
    for phase in (weights_phase(iterations=0), weights_phase(rounding_lr=0.0)):
        unit = Learnable([layer_of()], [], lambda _: torch.zeros(()), 8, CPU)
        learned = learn_unit(phase, unit, Rng(0), lambda *_: None)
        assert learned.undecided is None and learned.steps == ()
