"""Which tensors are quantized under `deploy: full`, for small networks whose tensors can be listed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.nn.networks import Encoder, Network, Upsampling, float_model
from torch import nn
from torch.nn import functional as F

from synthquant.core.errors import SchemeError, UnsupportedModelError
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme


def full(network: nn.Module, scheme: str = "W8A8", **more: Any) -> QuantModel:
    return QuantModel.build(float_model(network), QuantScheme.parse({"preset": scheme, "deploy": "full", **more}))


def test_residual_network() -> None:
    model = full(Network(), "W4A4")
    assert {name: quantizer.num_bits for name, quantizer in model.quantizers.items()} == {
        "stem.input_quantizer": 8,
        "relu_0": 8,  # what the first layer puts out, behind its activation
        "blocks.0.conv1.output_quantizer": 4,
        "blocks.0.relu_0": 4,  # behind the sum: one kernel
        "blocks.1.conv1.output_quantizer": 4,
        "blocks.1.down.output_quantizer": 4,
        "blocks.1.relu_0": 4,
        "mean_0": 8,  # the last layer reads it
        "fc.output_quantizer": 8,
    }
    assert {name: model.reads.get(name) for name in model.layers} == {
        "stem": "stem.input_quantizer",
        "blocks.0.conv1": "relu_0",
        "blocks.1.conv1": "blocks.0.relu_0",
        "blocks.1.down": "blocks.0.relu_0",
        "fc": "mean_0",
    }
    rows = {row.name: (row.kind, row.input_bits, row.output_bits) for row in model.operations}
    assert rows == {
        "relu_0": ("relu", (None,), 8),
        "blocks.0.add_0": ("add", (4, 8), 4),
        "blocks.0.relu_0": ("relu", (None,), 4),
        "blocks.1.add_0": ("add", (4, 4), 4),
        "blocks.1.relu_0": ("relu", (None,), 4),
        "mean_0": ("mean", (4,), 8),
    }
    assert model.quantizers["stem.input_quantizer"].fixed
    assert model.quantizers["fc.output_quantizer"].args.observer == "minmax"
    assert [model.input_bits(name) for name in model.layers] == [8, 8, 4, 4, 8]


def test_concatenation_and_transposed_convolution() -> None:
    model = full(Upsampling())
    assert list(model.quantizers) == [
        "stem.input_quantizer",
        "relu_0",
        "relu_1",
        "relu_2",
        "up.output_quantizer",
        "cat_0",
        "relu_3",
        "mean_0",
        "fc.output_quantizer",
    ]


class Dense(nn.Module):
    """Concatenates one tensor, then two, as DenseNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(torch.cat([self.a(x)], 1))
        return self.fc(torch.cat([x, self.b(x)], 1).mean((2, 3)))


def test_a_concatenation_of_one_tensor_is_that_tensor() -> None:
    model = full(Dense())
    outputs = ["a.output_quantizer", "hardswish_0", "b.output_quantizer", "cat_1", "mean_0", "fc.output_quantizer"]
    assert list(model.quantizers) == ["a.input_quantizer", *outputs]
    assert model.operations[0].input_bits == (8,)


class Gated(nn.Module):
    """Squeeze and excitation, an activation that runtimes do not fuse, and pooling that only picks values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.squeeze = nn.Conv2d(4, 4, 1)
        self.gate = nn.Sigmoid()
        self.act = nn.SiLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        x = x * self.gate(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = F.max_pool2d(x, 4)
        return self.fc(self.drop(torch.flatten(x, 1)))


def test_gates_and_activations_that_are_not_fused() -> None:
    model = full(Gated())
    assert list(model.quantizers) == [
        "stem.input_quantizer",
        "stem.output_quantizer",  # Conv -> Q/DQ -> SiLU
        "sigmoid_0",  # SiLU is a product with a sigmoid
        "mul_0",
        "mean_0",
        "squeeze.output_quantizer",
        "sigmoid_1",
        "mul_1",  # pooled, flattened and read by the classifier on the same grid
        "fc.output_quantizer",
    ]
    assert model.reads.get("fc") == "mul_1"


class TokenBlock(nn.Module):
    """Attention and an MLP around a residual stream, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


class Tokens(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        self.block, self.norm, self.head = TokenBlock(), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.block(x))[:, 0])


def test_transformer() -> None:
    model = full(Tokens())
    assert list(model.quantizers) == [
        "patch.input_quantizer",
        "patch.output_quantizer",
        "add_0",
        "block.layer_norm_0",
        "block.qkv.output_quantizer",  # query, key and value are views of one tensor
        "block.softmax_0",
        "block.matmul_1",
        "block.proj.output_quantizer",
        "block.add_0",
        "block.layer_norm_1",
        "block.fc1.output_quantizer",
        "block.gelu_0",
        "block.fc2.output_quantizer",
        "block.add_1",
        "layer_norm_0",
        "head.output_quantizer",
    ]
    rows = {row.name: row for row in model.operations}
    assert (rows["block.matmul_0"].input_bits, rows["block.matmul_0"].output_bits) == ((8, 8), None)
    assert rows["block.matmul_1"].input_bits == (8, 8)
    assert (rows["cat_0"].input_bits, rows["cat_0"].output_bits) == ((8,), None)


def test_torch_s_own_encoder_layer() -> None:
    model = full(Encoder())
    assert list(model.quantizers)[2:10] == [
        *(f"encoder.self_attn.{name}_proj.output_quantizer" for name in ("q", "k", "v")),
        "encoder.self_attn.softmax_0",
        "encoder.self_attn.matmul_1",
        "encoder.self_attn.out_proj.output_quantizer",
        "encoder.add_0",
        "encoder.layer_norm_0",
    ]
    products = [row for row in model.operations if row.kind == "matmul"]
    assert [row.input_bits for row in products] == [(8, 8)] * 2


class Queried(nn.Module):
    """A learned query, which is no data and yet what a layer puts out, and a position bias of the same kind."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head, self.q = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5), nn.Linear(8, 8)
        self.query, self.bias = nn.Parameter(torch.ones(1, 8)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        scores = self.q(self.query) @ x.transpose(1, 2) + self.bias(self.query)
        return self.head((scores.softmax(-1) @ x)[:, 0])


def test_a_learned_query_is_quantized_where_its_layer_makes_it() -> None:
    model = full(Queried())
    rows = {row.name: row for row in model.operations}
    assert rows["matmul_0"].input_bits == rows["matmul_1"].input_bits == (8, 8)
    assert "q.output_quantizer" in model.quantizers
    assert (rows["add_0"].input_bits, rows["add_0"].output_bits) == ((None,), None), "a constant is added in float"


class Tupled(nn.Module):
    """An operation that returns its one tensor in a tuple, with nothing beside it: torch's attention by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
        self.in_proj, self.out_proj = nn.Parameter(torch.eye(8).repeat(3, 1)), nn.Parameter(torch.eye(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, zeros = self.patch(x).flatten(2).permute(2, 0, 1), torch.zeros(24)
        arguments = x, x, x, 8, 2, self.in_proj, zeros, None, None, False, 0.0, self.out_proj, zeros[:8]
        return self.head(F.multi_head_attention_forward(*arguments, training=False, need_weights=False)[0].mean(0))


def test_an_operation_that_returns_a_tuple() -> None:
    model = full(Tupled())
    (row,) = [row for row in model.operations if row.name == "multi_head_attention_forward_0"]
    assert (row.input_bits, row.output_bits) == ((8,) * 3, 8), "one operation in float"
    quantizer = model.quantizers[row.name]
    quantizer.forward = lambda x: torch.zeros_like(x)  # type: ignore[method-assign]
    with model.mode(weights=False, activations=False):
        without = model(torch.ones(1, 3, 8, 8))
    assert not torch.allclose(without, model.float_model.module(torch.ones(1, 3, 8, 8)))


def test_ignored_layers_and_operations_compute_in_float() -> None:
    model = full(Network(), ignore=["fc", "blocks.0.*"])
    names = list(model.quantizers)
    assert names == [
        "stem.input_quantizer",
        "blocks.0.relu_0",  # made in float, but quantized layers read it
        "blocks.1.conv1.output_quantizer",
        "blocks.1.down.output_quantizer",
        "blocks.1.relu_0",
    ], "a float layer reads and puts out floats"
    assert model.layers.keys() == {"stem", "blocks.1.conv1", "blocks.1.down"}
    assert {row.name: row.reason for row in model.coverage()}["fc"] == "left out by the scheme"


def test_overrides_of_operations() -> None:
    model = full(Upsampling(), overrides={"up*": {"input_activations": {"num_bits": 16}}, "fc": {"weights": None}})
    assert model.quantizers["up.output_quantizer"].num_bits == 16
    assert model.quantizers["relu_1"].num_bits == 8
    model = full(Upsampling(), "W4A4", overrides={"out": {"input_activations": {"num_bits": 6}}})
    assert (model.quantizers["cat_0"].num_bits, model.quantizers["up.output_quantizer"].num_bits) == (6, 4)
    with pytest.raises(SchemeError, match="pattern 'mul_\\*' matches no layer"):
        full(Upsampling(), ignore=["mul_*"])


def test_one_tensor_has_one_grid_that_suits_all_readers() -> None:
    model = full(Network(), "W4A4", overrides={"blocks.1.down": {"input_activations": {"num_bits": 6}}})
    assert model.quantizers["blocks.0.relu_0"].num_bits == 6
    assert model.input_bits("blocks.1.conv1") == 6


class Repeating(nn.Module):
    """One block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = Network().blocks[0]
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.fc(self.block(self.block(x)).mean((2, 3)))


def test_a_module_that_runs_twice_quantizes_alike_each_time() -> None:
    model = full(Repeating())
    assert [name for name in model.quantizers if name.startswith("block.")] == [
        "block.conv1.output_quantizer",
        "block.batch_norm_0",  # no batch norm of a shared layer is folded
        "block.relu_0",
    ]


class OldName(nn.Module):
    """Changes a tensor in place and goes on under its old name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.next = nn.Conv2d(4, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        F.relu_(x)
        return self.next(x).mean((2, 3))


def test_a_tensor_that_would_escape_its_quantizer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer 'next' reads relu__?0 without .* write x = f\(x\)"):
        full(OldName())
    QuantModel.build(float_model(OldName()), "W8A8")


class Moody(nn.Module):
    """Does something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, self.calls = self.stem(x).mean((2, 3)), self.calls + 1
        for _ in range(self.calls):
            x = x.abs()
        return x


def test_a_network_that_does_something_else_each_time_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="runs other operations each time"):
        full(Moody())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"preset": "W4A16"}, "give input_activations"),
        ({"preset": "W4A4", "shortcuts": False}, "leave shortcuts on"),
        ({"preset": "W4A4", "deploy": "all"}, "deploy"),
    ],
)
def test_schemes_that_make_no_sense(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        QuantScheme.parse({"deploy": "full", **fields})


def test_the_scheme_tells() -> None:
    assert "deploy full" in QuantScheme.parse({"preset": "W8A8", "deploy": "full"}).describe()
    assert "deploy" not in QuantScheme.parse("W8A8").describe()
