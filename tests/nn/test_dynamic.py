"""The kind of quantizer whose range is measured at run time."""

from __future__ import annotations

import pytest
import torch
from tests.nn.toy_denoiser import denoiser

from synthquant.core.errors import SchemeError
from synthquant.nn.activation_quantizers import new_quantizer
from synthquant.nn.dynamic import DynamicQuantizer, dynamic_quantize
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantArgs, QuantScheme


def quantizer(strategy: str = "tensor", bits: int = 4, *, symmetric: bool = False) -> DynamicQuantizer:
    args = QuantArgs.model_validate({"num_bits": bits, "kind": "dynamic", "strategy": strategy, "symmetric": symmetric})
    found = new_quantizer(args)
    assert isinstance(found, DynamicQuantizer)
    return found


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_each_sample_has_the_range_of_its_own_values() -> None:
    x = noise(2, 3, 4, 4) * torch.tensor([1.0, 50.0]).reshape(2, 1, 1, 1) + torch.tensor([2.0, 0.0]).reshape(2, 1, 1, 1)
    found = quantizer()(x)
    for row, made in zip(x, found, strict=True):
        low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))
        scale = (high - low) / 15
        zero = round(-low / scale)
        wanted = ((row / scale).round() + zero).clamp(0, 15).sub(zero) * scale
        torch.testing.assert_close(made, wanted)
    assert torch.equal(quantizer()(x[1:]), found[1:])


@pytest.mark.parametrize("dim", [1, -1])
def test_each_token_has_one(dim: int) -> None:
    x = noise(2, 5, 4, 3)
    one = quantizer("token", 8, symmetric=True)
    one.channel_dim = dim
    found = one(x).movedim(dim, -1).flatten(0, -2)
    for token, made in zip(x.movedim(dim, -1).flatten(0, -2), found, strict=True):
        largest = float(token.abs().max())
        scale = 2 * largest / 255 if bool((token < 0).any()) else largest / 255
        assert float((made - token).abs().max()) <= scale * 1.01
        assert float(made.abs().max()) <= largest + scale


def test_symmetric_grids_have_zero_in_the_middle() -> None:
    x = torch.tensor([[-1.5, 0.25, 3.0], [0.0, 1.0, 3.0]])
    found = dynamic_quantize(x, 2, symmetric=True, shared=(1,))
    assert found.tolist() == [[-2.0, 0.0, 2.0], [0.0, 1.0, 3.0]]  # codes -2, -1, 0, 1 of steps of 2; then 0 .. 3


def test_nothing_is_calibrated_kept_or_learned() -> None:
    one = quantizer()
    assert one.calibrated and one.fixed and one.grid() == {} and one.learnable() == []
    assert list(one.candidates(0.0, 1.0, [0.5, 1.0])) == [{}]
    model = QuantModel.build(
        denoiser(), QuantScheme.parse({"preset": "W4A4", "input_activations": {"kind": "dynamic"}})
    )
    assert model.calibrated
    model.require_calibrated()


def test_half_precision_has_the_codes_of_float() -> None:
    x = noise(2, 64).half()
    made = quantizer(bits=8)(x)
    assert made.dtype == torch.float16
    assert torch.equal(made, quantizer(bits=8)(x.float()).half())


def test_a_scheme_may_say_tokens_for_activations_of_this_kind_only() -> None:
    scheme = QuantScheme.parse({"preset": "W8A8", "input_activations": {"kind": "dynamic", "strategy": "token"}})
    assert "activations 8 bit dynamic per token" in scheme.describe()
    quantizers = QuantModel.build(denoiser(), scheme).quantizers
    assert quantizers["conv_in.input_quantizer"].channel_dim == 1
    assert quantizers["to_q.input_quantizer"].channel_dim == -1
    with pytest.raises(SchemeError, match="input_activations cannot have strategy 'token'; only 'tensor'"):
        QuantScheme.parse({"preset": "W8A8", "input_activations": {"strategy": "token"}})
    with pytest.raises(SchemeError, match="weights cannot have strategy 'token'"):
        QuantScheme.parse({"preset": "W8A8", "weights": {"strategy": "token"}})
