"""The life of an activation quantizer: observe, calibrate, use, learn."""

from __future__ import annotations

import pytest
import torch

from synthquant.core.errors import UnknownNameError
from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.functional import fake_quantize
from synthquant.nn.observers import ActivationHistogram
from synthquant.nn.scheme import QuantArgs


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def ready(bits: int = 4, scale: float = 0.2, zero_point: float = 8.0) -> AffineQuantizer:
    quantizer = AffineQuantizer(QuantArgs(num_bits=bits))
    quantizer.set_grid(torch.tensor([scale]), torch.tensor([zero_point]))
    return quantizer


def test_used_too_early_or_calibrated_from_nothing() -> None:
    quantizer = AffineQuantizer(QuantArgs(num_bits=4))
    with pytest.raises(RuntimeError, match="before it was calibrated"):
        quantizer(normal(3))
    with pytest.raises(RuntimeError, match="saw no data"):
        quantizer.calibrate("genie")
    quantizer.enabled = False
    x = normal(3)
    assert quantizer(x) is x


def test_observes_without_quantizing_then_calibrates() -> None:
    quantizer = AffineQuantizer(QuantArgs(num_bits=8))
    quantizer.watcher = ActivationHistogram()
    x = normal(4, 5)
    for first_pass in (True, False):
        quantizer.watching_range = first_pass
        assert quantizer(x) is x
    quantizer.calibrate("minmax")
    assert quantizer.watcher is None and quantizer.calibrated
    low, high = float(x.min()), float(x.max())
    assert float(quantizer.scale) == pytest.approx((high - low) / 255)
    assert float((quantizer(x) - x).abs().max()) <= float(quantizer.scale) * 0.51


def test_the_scheme_s_observer_wins_over_the_method_s() -> None:
    scales = []
    for args in (QuantArgs(num_bits=2, observer="minmax"), QuantArgs(num_bits=2)):
        quantizer = AffineQuantizer(args)
        quantizer.watcher = ActivationHistogram()
        quantizer.watching_range = True
        quantizer(normal(500))
        quantizer.watching_range = False
        quantizer(normal(500))
        quantizer.calibrate("genie")
        scales.append(float(quantizer.scale))
    assert scales[0] > scales[1]
    quantizer.watcher = ActivationHistogram()
    quantizer.watcher.observe_range(normal(3))
    quantizer.watcher.observe(normal(3))
    with pytest.raises(UnknownNameError, match="unknown observer"):
        quantizer.calibrate("gennie")


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_fixed_and_learning_give_the_same_values(bits: int) -> None:
    quantizer = ready(bits, 0.01 if bits > 4 else 0.3, float(2 ** (bits - 1)))
    x = normal(2, 3, 4, 5)
    fixed = quantizer(x)
    assert torch.equal(fixed, fake_quantize(x, quantizer.scale, quantizer.zero_point, 2**bits - 1))
    quantizer.learning = True
    assert torch.allclose(quantizer(x), fixed, atol=1e-6)


def test_dropping_mixes_quantized_and_float_values_anew_each_time() -> None:
    quantizer = ready()
    quantizer.learning, quantizer.quantize_probability = True, 0.5
    quantizer.generator = torch.Generator().manual_seed(1)
    x = normal(4000)
    hard = fake_quantize(x, quantizer.scale, quantizer.zero_point, 15)
    first, second = quantizer(x), quantizer(x)
    for mixed in (first, second):
        # A value on the grid is the same either way, to the last bit or so.
        from_grid = torch.isclose(mixed, hard, atol=1e-6)
        assert bool((from_grid | torch.isclose(mixed, x, atol=1e-6)).all())
        assert 0.45 < float(from_grid.float().mean()) < 0.55
    assert not torch.equal(first, second)
    quantizer.generator = torch.Generator().manual_seed(1)
    assert torch.equal(quantizer(x), first)


@pytest.mark.parametrize(
    ("symmetric", "zero_point", "largest"), [(False, 8.0, 15), (False, 0.0, 15), (True, 0.0, 15), (True, 8.0, 7)]
)
def test_lsq_gradient_scale(symmetric: bool, zero_point: float, largest: int) -> None:
    """LSQ (arXiv:1902.08153): `1 / sqrt(N Q_P)`, `Q_P = 2**(b - 1) - 1` for signed data and `2**b - 1` for unsigned."""
    found = []
    for scaled in (False, True):
        quantizer = AffineQuantizer(QuantArgs(num_bits=4, symmetric=symmetric))
        quantizer.set_grid(torch.tensor([0.2]), torch.tensor([zero_point]))
        quantizer.learning, quantizer.lsq_gradient_scale = True, scaled
        quantizer.scale.requires_grad_(True)
        quantizer(normal(100)).square().sum().backward()
        assert quantizer.scale.grad is not None
        found.append(float(quantizer.scale.grad))
    assert found[1] == pytest.approx(found[0] / (100 * largest) ** 0.5, rel=1e-5)


def test_grids_stay_legal() -> None:
    quantizer = ready(zero_point=40.0)
    assert float(quantizer.zero_point) == 15
    with torch.no_grad():
        quantizer.scale.fill_(-1.0)
    quantizer.keep_legal()
    assert float(quantizer.scale) > 0
    assert "4 bits, calibrated" in repr(quantizer)
