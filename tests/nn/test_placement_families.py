"""`deploy: full` on full-size architectures: no sum, gate, pooling or product of matrices is left in floating point."""

from __future__ import annotations

import pytest
import torch

from synthquant.models.open import open_model
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme

OF_TWO = ("add", "mul", "cat", "matmul")
OF_ONE = ("adaptive_avg_pool2d", "mean", "sigmoid")


@pytest.mark.parametrize(
    ("source", "size", "operations"),
    [
        ("torchvision/resnet18", 32, {"add": 8, "adaptive_avg_pool2d": 1, "relu": 17}),
        ("torchvision/mobilenet_v2", 32, {"add": 10, "adaptive_avg_pool2d": 1, "hardtanh": 35}),
        ("torchvision/regnet_y_400mf", 32, {"add": 16, "mul": 16, "sigmoid": 16, "adaptive_avg_pool2d": 17}),
        ("timm/efficientnet_b0", 32, {"add": 9, "mul": 65, "sigmoid": 65, "mean": 16}),
        ("timm/convnext_atto", 32, {"add": 12, "gelu": 12, "adaptive_avg_pool2d": 1}),
        ("timm/vit_tiny_patch16_224", 32, {"add": 25, "matmul": 24, "softmax": 12, "gelu": 12, "layer_norm": 25}),
    ],
)
@torch.no_grad()
def test_what_kernels_read_has_a_grid(source: str, size: int, operations: dict[str, int]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        float_model = open_model(
            source, pretrained=False, input_size=(size, size), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
        )
    model = QuantModel.build(float_model, QuantScheme.parse({"preset": "W8A8", "deploy": "full"}))
    kinds = [row.kind for row in model.operations]
    assert {kind: kinds.count(kind) for kind in operations} == operations
    for row in model.operations:
        # A position embedding is added in floating point: it is no data.
        if row.kind in OF_ONE or (row.kind in OF_TWO and len(row.input_bits) > 1):
            assert None not in row.input_bits, row
        if row.kind in ("gelu", "layer_norm"):
            assert (row.input_bits, row.output_bits) == ((8,), 8), row
        if row.kind in ("relu", "hardtanh"):
            assert (row.input_bits, row.output_bits) == ((None,), 8), row
    assert all(model.input_bits(name) == 8 for name in model.layers)
