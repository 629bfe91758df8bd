"""Twin uniform quantization: piecewise values by hand, the split that is chosen, the forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from synthquant.nn.activation_quantizers import new_quantizer
from synthquant.nn.scheme import QuantArgs
from synthquant.nn.twin_uniform import GELU_MINIMUM, TwinUniformQuantizer


def quantizer(bits: int = 4) -> TwinUniformQuantizer:
    made = new_quantizer(QuantArgs(num_bits=bits, kind="twin_uniform"))
    assert isinstance(made, TwinUniformQuantizer)
    return made


def seen(x: Tensor, bits: int = 4, headroom: float = 1.0) -> TwinUniformQuantizer:
    made = quantizer(bits)
    made.headroom = headroom
    made.watcher, made.watching_range = made.new_watcher(), True
    made(x)
    made.watching_range = False
    made(x)
    made.calibrate("genie")
    return made


def softmax_form(bits: int, power: int) -> TwinUniformQuantizer:
    made = quantizer(bits)
    made.load_grid(list(made.candidates(0.0, 1.0, ()))[power])
    return made


def test_the_softmax_s_form_by_hand() -> None:
    """Four bits and a split at 1/8: steps of 1/56 below it, of 1/7 from it on; nothing is counted twice."""
    made = softmax_form(4, 3)
    assert torch.allclose(made.scale, torch.tensor([1 / 56, 1 / 7])) and float(made.split) == 1 / 8
    x = torch.tensor([0, 0.008, 0.01, 0.05, 0.124, 0.125, 0.3, 0.52, 0.93, 1.0, 1.2])
    wanted = torch.tensor([0, 0, 1 / 56, 3 / 56, 7 / 56, 1 / 7, 2 / 7, 4 / 7, 1, 1, 1])
    assert torch.allclose(made.quantize(x), wanted)


def test_the_gelu_s_form_by_hand() -> None:
    made = quantizer(4)
    made.cover(-0.1, 3.5)
    step = -GELU_MINIMUM / 8
    assert torch.allclose(made.scale, torch.tensor([step, 0.5])) and float(made.split) == 0
    x = torch.tensor([-1.0, GELU_MINIMUM, -0.1, -0.01, 0, 0.2, 0.3, 1.3, 3.4, 9.0])
    wanted = torch.tensor([-8 * step, -8 * step, -5 * step, 0, 0, 0, 0.5, 1.5, 3.5, 3.5])
    assert torch.allclose(made.quantize(x), wanted)
    made.cover(-2.0, 7.0)
    assert torch.allclose(made.scale, torch.tensor([0.25, 1.0])), "no GELU: the range reaches to what lies below"


@pytest.mark.parametrize("power", [0, 4, 19])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_are_within_half_a_step(bits: int, power: int) -> None:
    made = softmax_form(bits, power)
    x = torch.cat([torch.linspace(0, 1, 2001), torch.linspace(0, 2.0**-power, 2001)])
    error, below = (made.quantize(x) - x).abs(), x < 2.0**-power
    small, large = made.scale.tolist()
    assert float(error[~below].max()) <= large / 2 * 1.0001
    if bool(below.any()):
        assert float(error[below].max()) <= small / 2 * 1.0001
    assert float(made.quantize(torch.zeros(1))) == 0


def test_the_split_is_the_best_of_powers_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for sharpness in (0.5, 6.0):
        x = torch.softmax(torch.randn(4, 2, 64, 64, generator=generator) * sharpness, -1)
        errors = [((softmax_form(4, power).quantize(x) - x).abs() ** 2.4).mean() for power in range(20)]
        chosen.append(seen(x))
        power = -int(torch.log2(chosen[-1].split))
        assert errors[power] <= 1.05 * min(errors), "up to the bins of the histogram"
    assert float(chosen[0].split) < float(chosen[1].split) < 1


def test_the_positive_step_is_searched_and_the_negative_one_is_not() -> None:
    x = torch.nn.functional.gelu(torch.randn(4, 16, 64, generator=torch.Generator().manual_seed(0)) * 2)
    x[0, 0, 0] = 40.0  # an outlier
    made = seen(x)
    assert float(made.scale[0]) == pytest.approx(-GELU_MINIMUM / 8) and float(made.scale[1]) < 0.6 * 40 / 7
    whole = quantizer(4)
    whole.cover(-0.1, 40.0)
    assert float(((made.quantize(x) - x).abs() ** 2.4).mean()) < float(((whole.quantize(x) - x).abs() ** 2.4).mean())
    assert len(list(made.candidates(0.0, 1.0, (1.0,)))) == 20 and len(list(made.candidates(-1.0, 1.0, (1.0, 0.5)))) == 2
    assert float(seen(torch.rand(4, 64) * 3).scale[1]) == pytest.approx(3 / 7, rel=0.02), "no softmax: up to its end"


def test_gradients_are_those_of_each_range() -> None:
    made = softmax_form(4, 3)
    made.scale.requires_grad_(True)
    x = torch.tensor([0.01, 0.3, 1.5], requires_grad=True)
    made.quantize_learning(x, None).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 0]
    assert made.scale.grad is not None
    wanted = torch.tensor([1 - 0.56, (2 - 2.1) + 7])
    assert torch.allclose(made.scale.grad, wanted, atol=1e-4)


def test_both_forms_are_arithmetic_that_export_follows() -> None:
    x = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    for made, given in ((softmax_form(4, 3), x), (seen(x - 0.5), x - 0.5)):
        assert torch.equal(torch.export.export(made, (given,)).module()(given), made(given))
