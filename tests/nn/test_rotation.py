"""Input channels rotated by Hadamard matrices in blocks (ConvRot, arXiv:2512.03673)."""

from __future__ import annotations

import pytest
import torch
from tests.nn.toy_denoiser import Denoiser, denoiser
from torch import nn

from synthquant.core.errors import SchemeError
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.rotation import RotatedLayer, hadamard, rotate, rotation_block
from synthquant.nn.scheme import QuantScheme

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 4, 16, 64, 256])
def test_the_matrix_is_regular_orthogonal_and_symmetric(size: int) -> None:
    matrix = hadamard(size, torch.float32, CPU)
    assert matrix.shape == (size, size) and torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, torch.eye(size))
    assert set((matrix * size**0.5).unique().tolist()) <= {-1.0, 1.0}
    assert matrix.sum(1).tolist() == [1.0] * size, "no channel gathers the mean of its block"
    if size > 4:
        torch.testing.assert_close(
            matrix, torch.kron(hadamard(4, torch.float32, CPU), hadamard(size // 4, torch.float32, CPU))
        )


@pytest.mark.parametrize(
    ("channels", "largest", "block"),
    [(3, 256, 1), (4, 256, 4), (24, 256, 4), (48, 256, 16), (512, 256, 256), (512, 255, 64), (320, 256, 64), (8, 4, 4)],
)
def test_a_block_is_the_largest_power_of_four_that_divides_the_channels(
    channels: int, largest: int, block: int
) -> None:
    assert rotation_block(channels, largest) == block


def test_each_block_of_a_dimension_is_rotated_on_its_own() -> None:
    x, matrix = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0)), hadamard(4, torch.float32, CPU)
    wanted = torch.cat([torch.einsum("ij,bjhw->bihw", matrix, part) for part in x.split(4, 1)], 1)
    torch.testing.assert_close(rotate(x, 1, 4), wanted)
    torch.testing.assert_close(rotate(x.movedim(1, -1), -1, 4), wanted.movedim(1, -1))
    torch.testing.assert_close(rotate(x.movedim(1, 0), 0, 4), wanted.movedim(1, 0))
    torch.testing.assert_close(rotate(rotate(x, 1, 4), 1, 4), x)
    assert rotate(x, 1, 1) is x


def test_the_float_network_computes_the_same() -> None:
    model = QuantModel.build(denoiser(), QuantScheme.parse({"preset": "W8A8", "rotation": {}}))
    example = model.float_model.example(3)
    with torch.no_grad(), model.mode(weights=False, activations=False):
        torch.testing.assert_close(
            example.call(model)[0], example.call(model.float_model.module)[0], rtol=1e-4, atol=1e-4
        )
    blocks = {name: layer.block for name, layer in model.layers.items() if isinstance(layer, RotatedLayer)}
    # `grouped` and `up` have two groups of four channels; the image's three channels are left as they are.
    assert blocks == dict.fromkeys(model.layers, 4) | {"conv_in": 1}
    own, before = model.layers["up"].float_weight, denoiser().module.get_submodule("up").weight
    assert not torch.equal(own, before), "weights are rotated"
    torch.testing.assert_close(rotate(own, 0, 4), before)


def test_layers_read_tokens_where_kernels_can_and_samples_elsewhere() -> None:
    model = QuantModel.build(denoiser(), QuantScheme.parse({"preset": "W4A4", "ends": "same", "rotation": {}}))
    args = {name: model.quantizers[reads].args for name, reads in model.reads.items()}
    assert {name: one.strategy for name, one in args.items()} == {
        **dict.fromkeys(("conv_in", "grouped", "down", "up"), "tensor"),
        **dict.fromkeys(("time", "to_q", "to_k", "to_v", "conv_out"), "token"),
    }
    assert all(one.symmetric and one.kind == "dynamic" for one in args.values())
    products = [one.args for name, one in model.quantizers.items() if name not in model.reads.values()]
    assert len(products) == 4 and {(one.kind, one.num_bits, one.strategy) for one in products} == {
        ("dynamic", 8, "tensor")
    }
    assert "activations 4 bit symmetric, ranges of tokens or samples" in model.scheme.describe()
    assert model.calibrated and "rotated in blocks of up to 256 channels" in model.scheme.describe()


def test_what_does_not_go_with_rotation() -> None:
    assert "rotation" not in QuantScheme.parse("W8A8").model_dump()
    with pytest.raises(SchemeError, match="rotation quantizes what layers read, and no runtime has it"):
        QuantScheme.parse({"preset": "W8A8", "deploy": "full", "rotation": {}})
    with pytest.raises(SchemeError, match="for which a softmax of kind 'log_sqrt2' has none"):
        QuantScheme.parse({"preset": "W8A8", "attention": {"softmax": {"kind": "log_sqrt2"}}, "rotation": {}})


def test_a_weight_that_another_module_has_too_stays_as_it_is_there() -> None:
    network = Denoiser()
    network.table = nn.Embedding(8, 8)  # type: ignore[assignment]
    network.table.weight = network.to_q.weight  # type: ignore[assignment, union-attr]
    model = QuantModel.build(denoiser(network), QuantScheme.parse({"preset": "W8A8", "rotation": {}}))
    assert torch.equal(model.module.get_submodule("table").weight, network.to_q.weight)
    assert not torch.equal(model.layers["to_q"].float_weight, network.to_q.weight)
