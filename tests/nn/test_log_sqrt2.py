"""The logarithmic quantizer of softmaxes, against its definition."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.nn.networks import NormedTokens, float_model
from tests.small_networks import small_images

from synthquant.core.errors import SchemeError
from synthquant.core.rng import Rng
from synthquant.export.onnx import Onnx
from synthquant.nn.activation_quantizers import new_quantizer
from synthquant.nn.log_sqrt2 import LogSqrt2Quantizer
from synthquant.nn.observers import PERCENTILES
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantArgs, QuantScheme
from synthquant.quantize import Rtn

SOFTMAX = {"softmax": {"num_bits": 4, "kind": "log_sqrt2"}}


def quantizer(bits: int, scale: float) -> LogSqrt2Quantizer:
    one = new_quantizer(QuantArgs(num_bits=bits, kind="log_sqrt2"))
    assert isinstance(one, LogSqrt2Quantizer)
    one.fix(0.0, scale)
    return one


def rounded(x: float, bits: int, scale: float) -> float:
    """RepQ-ViT's quantizer for one number."""
    if x <= 0:
        return 0.0
    code = round(-2 * math.log2(x / scale))
    if code >= 2**bits:
        return 0.0
    code = max(code, 0)
    return scale * 2 ** -math.ceil(code / 2) * (math.sqrt(2) if code % 2 else 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_value_is_the_power_of_sqrt_2_that_the_paper_gives(bits: int) -> None:
    scale = 0.8
    x = torch.cat(
        [torch.tensor([0.0, 1.0, 0.8, 1e-30]), torch.rand(500, generator=torch.Generator().manual_seed(0)) ** 4]
    )
    found = quantizer(bits, scale)(x)
    wanted = torch.tensor([rounded(float(value), bits, scale) for value in x])
    assert torch.allclose(found, wanted, atol=1e-7)
    assert len(found.unique()) <= 2**bits + 1


def test_the_scale_is_the_quantile_with_the_smallest_squared_error() -> None:
    x = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(0)) * 0.02
    x[0, :100], x[0, 100:103] = 0.3, 0.357
    one = new_quantizer(QuantArgs(num_bits=4, kind="log_sqrt2"))
    one.watcher = one.new_watcher()
    one.watcher.observe_range(x)
    one.watcher.observe(x)
    one.calibrate("minmax")
    scales = [float(x.quantile(share)) for share in PERCENTILES]
    errors = [float((quantizer(4, scale)(x) - x).square().mean()) for scale in scales]
    best = scales[errors.index(min(errors))]
    assert len({round(scale, 2) for scale in scales}) == 3 and best == scales[1]
    assert float(one.grid()["scale"]) == pytest.approx(best, abs=1 / 2048)


def test_gradients_are_those_of_straight_through_rounding() -> None:
    one, x = quantizer(3, 0.5), torch.tensor([0.9, 0.4, 0.1, 0.001], requires_grad=True)
    one.learning = True
    one.scale.requires_grad_(True)
    y = one(x)
    assert torch.equal(y.detach(), one.quantize(x).detach())
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    (y * weights).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 10.0, 100.0, 1000.0]
    shares = y.detach() / 0.5 - (x.detach() / 0.5).clamp(max=1)
    shares[0] += 1  # what saturates moves with the scale
    assert one.scale.grad is not None and float(one.scale.grad) == pytest.approx(
        float((shares * weights).sum()), rel=1e-4
    )


def test_negative_values_are_refused() -> None:
    scheme = QuantScheme.parse({"preset": "W4A4", "ends": "same", "input_activations": {"kind": "log_sqrt2"}})
    with pytest.raises(SchemeError, match=r"^kind 'log_sqrt2' quantizes what is never negative, and -[\d.]+ was seen"):
        Rtn().apply(QuantModel.build(float_model(NormedTokens()), scheme), small_images(4), Rng(0))


def test_simulate_writes_it_and_runtimes_refuse_it_by_name(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = float_model(NormedTokens())
    scheme = {"preset": "W4A4", "attention": SOFTMAX, "weights": {"symmetric": True}}
    with pytest.raises(SchemeError, match=r"block\.matmul_1\.input_quantizer_0: .*kind 'log_sqrt2'"):
        Onnx(preset="openvino").check(QuantModel.build(network, QuantScheme.parse(scheme)))
    model = QuantModel.build(network, QuantScheme.parse({"preset": "W4A4", "attention": SOFTMAX}))
    Rtn().apply(model, small_images(8), Rng(0))
    exporter = Onnx(preset="simulate")
    found = exporter.verify(model, exporter.export(model, tmp_path / "net.onnx"), small_images(8))
    assert found["as_written"]["mean_error"] < 1e-4
