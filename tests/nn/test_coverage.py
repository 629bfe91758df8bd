"""Every weight and every matrix product of a forward pass is counted, against sums by hand."""

from __future__ import annotations

import pytest
import torch
from tests.nn.networks import Encoder, Network, float_model
from tests.nn.test_placement import Tokens
from torch import nn
from torch.nn import functional as F

from synthquant.evaluate.cost import float_cost, quantized_cost
from synthquant.models.products import find_products
from synthquant.models.signature import Inputs
from synthquant.nn.coverage import CoverageRow, summarize
from synthquant.nn.quant_model import QuantModel


class Attention(nn.Module):
    """Torch's attention: 8 channels, 4 positions, 2 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Functions(nn.Module):
    """Weights of a layer that never runs, of the module itself, of a buffer, and of a layer that runs as well."""

    blur: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.silent = nn.Conv2d(4, 4, 1, bias=False)
        self.own = nn.Parameter(torch.ones(6, 4, 3, 3))
        self.gain = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.unused = nn.Linear(2, 3)
        self.register_buffer("blur", torch.ones(6, 1, 2, 2))
        self.fc = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(self.stem(x), self.silent.weight)
        x = F.conv2d(x, self.own, padding=1) * self.gain
        x = F.conv2d(x, self.blur, groups=6, stride=2).mean((2, 3))
        return F.linear(self.fc(x), self.fc.weight[:5] * 2) + F.linear(x, self.fc.weight)[:, :5]


class Standardised(nn.Conv2d):
    """Multiplies with a weight that it computes from its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


class Grid(nn.Module):
    """A layer that reads a stored tensor: its work does not grow with the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Standardised(3, 4, 1)
        self.table = nn.Buffer(torch.ones(7, 2))
        self.mlp = nn.Linear(2, 4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x).mean((2, 3)) + self.mlp(self.table).mean(0))


class Recurrent(nn.Module):
    """Kernels that hide their products: a recurrent layer, and torch's encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.lstm = nn.LSTM(5, 3)
        self.fc = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.lstm(self.encoder(x)[None])[0][0])


def rows_of(network: nn.Module, scheme: object = "W4A4") -> dict[str, CoverageRow]:
    rows = QuantModel.build(float_model(network), scheme).coverage()  # type: ignore[arg-type]
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def test_attention_of_torch_is_layers_and_products() -> None:
    rows = rows_of(Attention(), {"preset": "W4A4", "attention": None})
    assert [(row.name, row.macs, row.parameters, row.weight_bits) for row in rows.values()] == [
        ("patch", 4 * 8 * 48, 8 * 48, 8),
        ("attention.q_proj", 4 * 64, 64, 4),
        ("attention.k_proj", 4 * 64, 64, 4),
        ("attention.v_proj", 4 * 64, 64, 4),
        ("attention.matmul_0", 4 * 4 * 8, 0, None),
        ("attention.matmul_1", 4 * 4 * 8, 0, None),
        ("attention.out_proj", 4 * 64, 64, 4),
        ("head", 40, 40, 8),
        ("add_0", 0, 0, None),  # the residual sum
    ]
    assert rows["attention.matmul_0"].reason == "computed outside of layers"


class Hidden(nn.Module):
    """Attention by a function, whose projections no layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
        self.in_proj, self.out_proj = nn.Parameter(torch.ones(24, 8)), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).permute(2, 0, 1)
        bias, out = torch.zeros(24), self.out_proj
        (x, _) = F.multi_head_attention_forward(
            *(x, x, x, 8, 2, self.in_proj, bias, None, None, False, 0.0, out.weight, out.bias),
            training=False,
            need_weights=False,
        )
        return self.head(x.mean(0))


def test_attention_by_a_function_is_counted_and_named() -> None:
    rows = rows_of(Hidden())
    projections, products = 4 * 8 * 24, 2 * 4 * 4 * 8
    assert [(row.name, row.macs, row.parameters, row.weight_bits) for row in rows.values()] == [
        ("patch", 4 * 8 * 48, 8 * 48, 8),
        ("in_proj", projections, 24 * 8, None),
        ("multi_head_attention_forward_0", products, 0, None),
        ("out_proj", 4 * 64, 64, None),
        ("head", 40, 40, 8),
    ]
    assert rows["out_proj"].reason == "its forward is never called, a function uses its weight"
    summary = summarize(rows.values())
    assert (summary.layers, summary.quantized_layers) == (4, 2)
    assert summary.weights == pytest.approx((384 + 40) / (384 + 40 + 256))
    assert summary.multiply_adds == pytest.approx((1536 + 40) / (1536 + 40 + 768 + 128 * 2 + 256))
    assert str(summary) == "quantized: 2 of 4 layers, 62.4% of weights, 55.2% of multiply-adds"
    assert summary.in_float == (
        "in float, with their share of multiply-adds: in_proj 26.9%, multi_head_attention_forward_0 9.0%, out_proj 9.0%"
    )


def test_weights_that_functions_use() -> None:
    rows = rows_of(Functions())
    positions = 8 * 8
    assert {name: (row.macs, row.parameters, row.weight_bits, row.input_bits) for name, row in rows.items()} == {
        "stem": (positions * 108, 108, 8, 8),
        "silent": (positions * 16, 16, None, None),
        "own": (positions * 6 * 36, 6 * 36, None, None),
        "blur": (16 * 24, 0, None, None),
        "fc": (36, 36, 8, 8),
        "linear_0": (30, 0, None, None),
        "fc.weight": (36, 0, 8, None),
        "gain": (0, 6, None, None),
        "unused": (0, 6, None, None),
        "add_0": (0, 0, None, None),
    }
    assert rows["unused"].reason == "its forward is never called"
    assert rows["gain"].reason == "no matrix product reads it as it is"
    assert rows["silent"].kind == "Conv2d" and rows["own"].kind == "Parameter"
    assert summarize(rows.values()).in_float.endswith(": own 62.1%, silent 4.6%, blur 1.7%, linear_0 0.1%")


def test_a_weight_computed_from_the_quantized_one_multiplies_in_float() -> None:
    row = rows_of(Grid())["conv"]
    assert (row.weight_bits, row.parameters, row.macs) == (None, 12, 64 * 12)
    assert row.reason == "multiplies in float, with a weight computed from the quantized one"


def test_work_that_does_not_depend_on_the_images_counts_once() -> None:
    assert rows_of(Grid())["mlp"].macs == 7 * 2 * 4


def test_fused_kernels_hide_nothing() -> None:
    rows = rows_of(Recurrent())
    assert rows["encoder.encoder.self_attn.q_proj"].macs == 4 * 8 * 8
    assert rows["encoder.encoder.linear1"].macs == 4 * 8 * 12
    assert rows["lstm.weight_ih_l0"].macs == 5 * 12 and rows["lstm.weight_hh_l0"].macs == 3 * 12
    fast = torch.backends.mha.get_fastpath_enabled()
    assert fast, "switched on again"


def test_products_of_two_tensors_are_quantized_under_deploy_full() -> None:
    papers = rows_of(Tokens(), {"preset": "W8A8", "attention": None})
    full = rows_of(Tokens(), {"preset": "W8A8", "deploy": "full"})
    (inside,) = (row for row in papers.values() if row.kind == "scaled_dot_product_attention")
    assert inside.weight_bits is None and inside.reason == "computed outside of layers"
    products = [row for row in full.values() if row.kind == "matmul"]
    assert [(row.weight_bits, row.input_bits, row.reason) for row in products] == [(8, 8, "")] * 2
    assert sum(row.macs for row in products) == inside.macs == 2 * 5 * 5 * 8
    assert summarize(full.values()).multiply_adds == 1 > summarize(papers.values()).multiply_adds


def test_operations_that_join_tensors_are_in_the_table() -> None:
    papers, full = rows_of(Network()), rows_of(Network(), {"preset": "W4A4", "deploy": "full"})
    sums = [name for name, row in papers.items() if row.kind == "add"]
    assert sums == ["blocks.0.add_0", "blocks.1.add_0"]
    assert {(papers[name].reason, papers[name].input_bits) for name in sums} == {("computed outside of layers", None)}
    one = full["blocks.0.add_0"]
    assert (one.input_bits, one.weight_bits, one.output_bits, one.reason) == (4, 8, 4, "")
    assert (full["relu_0"].output_bits, full["mean_0"].input_bits) == (8, 4) and "relu_0" not in papers
    assert [row.macs for row in full.values() if row.kind in ("add", "relu", "mean")] == [0] * 6


def test_many_float_products_are_named_in_short() -> None:
    rows = [CoverageRow(f"part{index}", "matmul", None, None, 0, 10 + index) for index in range(8)]
    assert summarize(rows).in_float == (
        "in float, with their share of multiply-adds: part7 15.7%, part6 14.8%, part5 13.9%, part4 13.0%, part3 12.0%"
        " and 3 more"
    )
    assert summarize([]).in_float == ""


def test_all_is_said_of_all_only() -> None:
    nearly = [CoverageRow("fc", "Linear", 4, 4, 9999, 9999), CoverageRow("last", "Linear", None, None, 1, 1)]
    assert str(summarize(nearly)) == "quantized: 1 of 2 layers, 99.9% of weights, 99.9% of multiply-adds"
    assert str(summarize(nearly[:1])) == "quantized: 1 of 1 layers, 100.0% of weights, 100.0% of multiply-adds"


def test_bit_operations_count_what_stays_float() -> None:
    model = QuantModel.build(float_model(Hidden()), {"preset": "W4A4", "ends": "same"})  # type: ignore[arg-type]
    patch, head, left = 1536, 40, 768 + 128 * 2 + 256
    assert quantized_cost(model).bit_operations == patch * 4 * 8 + head * 4 * 4 + left * 1024  # the image has 8 bits
    assert float_cost(model).bit_operations == (patch + head + left) * 1024


def test_a_tensor_with_two_names_is_counted_once() -> None:
    network = Network()
    before = float_cost(QuantModel.build(float_model(network), "W8A8")).size_bytes
    network.again = network.stem  # type: ignore[assignment]
    model = QuantModel.build(float_model(network), "W8A8")
    assert float_cost(model).size_bytes == before
    network.spare = nn.Parameter(network.fc.weight)
    assert float_cost(QuantModel.build(float_model(network), "W8A8")).size_bytes == before


@torch.no_grad()
def test_counting_leaves_the_network_as_it_was() -> None:
    network = Attention().train()
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    find_products(network, [Inputs.of(torch.ones(count, 3, 8, 8)) for count in (2, 3)], network)
    assert all(part.training for part in network.modules())
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules()]
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
