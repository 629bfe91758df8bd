"""How far each search of ranges goes: the shares of the whole range that its paper's code tries, and no others."""

from __future__ import annotations

import pytest
import torch

from synthquant.nn.affine import AffineQuantizer
from synthquant.nn.observers import OBSERVERS, ActivationHistogram, Samples
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.weight_quantizers import WeightLayout, WeightQuantizer

# BRECQ (arXiv:2102.05426), code: 80 shares, 1.00 to 0.21. Genie (arXiv:2212.04780), code: 100 shares, 1.00 to 0.01.
# QDrop (arXiv:2203.05740), code: 100 shares up to the whole.
SHARES = {
    "minmax": [1.0],
    "brecq": [1 - step / 100 for step in range(80)],
    "genie": [1 - step / 100 for step in range(100)],
    "qdrop": [step / 100 for step in range(1, 101)],
}


def samples(share: float, low: float) -> Samples:
    """Values that the grid over this share of the range holds exactly, and ends that count for next to nothing."""
    values = torch.tensor([[low, 1.0, share / 3, share * 2 / 3, share]])
    counts = torch.tensor([[1e-9, 1e-9, 0.3, 0.3, 0.4]])
    return Samples(values, counts, torch.tensor([low]), torch.tensor([1.0]))


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("wanted", [1.0, 0.99, 0.5, 0.22, 0.21, 0.2, 0.19, 0.02, 0.01])
def test_the_share_of_the_range_that_fits_is_found_where_it_is_searched(name: str, wanted: float) -> None:
    found, zero_point = OBSERVERS.get(name)(samples(wanted, 0.0), 2, symmetric=False, zero_inside=True)
    assert float(zero_point) == 0
    there = min(abs(share - wanted) for share in SHARES[name]) < 1e-9
    assert (float(found) * 3 == pytest.approx(wanted, rel=1e-4)) == there
    assert min(abs(share - float(found) * 3) for share in SHARES[name]) < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_mirrored_range_has_its_zero_at_the_even_middle(bits: int) -> None:
    """Whatever float32 makes of the division: half of an odd number of steps is a tie (Genie, BRECQ: half to even)."""
    largest = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 10
    rows = torch.stack([-largest, largest], 1)
    for symmetric in (False, True):
        scale, zero_point = OBSERVERS.get("minmax")(Samples.of_rows(rows), bits, symmetric=symmetric, zero_inside=True)
        assert bool((zero_point == 2 ** (bits - 1)).all())
        torch.testing.assert_close(scale, 2 * largest / (2**bits - 1))


def test_weights_need_no_zero_and_activations_do() -> None:
    """BRECQ and Genie, code: ends of weights are raw; QDrop, code: padding needs the zero of activations."""
    values = torch.linspace(1, 2, 50)
    weights = WeightQuantizer(WeightLayout((1, 50)), QuantArgs(num_bits=4, strategy="channel"))
    weights.calibrate(values[None], "minmax")
    assert float(weights.scale) == pytest.approx(1 / 15) and float(weights.zero_point) == -15
    activations = AffineQuantizer(QuantArgs(num_bits=4))
    activations.watcher, activations.headroom = ActivationHistogram(), 1.5
    activations.watcher.observe_range(values)
    activations.watcher.observe(values)
    activations.calibrate("minmax")
    assert float(activations.scale) == pytest.approx(1.5 * 2 / 15) and float(activations.zero_point) == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_qdrop_tries_every_zero_point(bits: int) -> None:
    """Values on a grid with its zero at one code, within ends on both sides of 0 that count for next to nothing."""
    top = 2**bits - 1
    codes, ends = torch.arange(top + 1), torch.ones(top + 1)
    values = torch.cat([(codes - codes[:, None]) / top, -ends[:, None], ends[:, None]], 1)
    counts = torch.tensor([1 / (top + 1)] * (top + 1) + [1e-9, 1e-9]).expand(top + 1, -1)
    scale, zero_point = OBSERVERS.get("qdrop")(
        Samples(values, counts, -ends, ends), bits, symmetric=False, zero_inside=True
    )
    assert zero_point.tolist() == codes.tolist()
    torch.testing.assert_close(scale * top, ends, rtol=1e-4, atol=0)
