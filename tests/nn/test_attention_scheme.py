"""`scheme.attention`: products of attention read quantized tensors in the papers' way, however they are written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.nn.networks import Encoder, Network, float_model
from tests.nn.test_placement import Tokens
from torch import nn
from torch.nn import functional as F

from synthquant.core.errors import SchemeError, UnsupportedModelError
from synthquant.models.open import open_model
from synthquant.nn.coverage import summarize
from synthquant.nn.operations import QuantScope, activation_quantizers
from synthquant.nn.quant_model import QuantModel
from synthquant.nn.scheme import QuantScheme

SOFTMAX = {"softmax": {"num_bits": 8}}


def papers(network: nn.Module, attention: dict[str, Any] | None = None, **more: Any) -> QuantModel:
    return QuantModel.build(float_model(network), QuantScheme.parse({"preset": "W4A4", "attention": attention, **more}))


def operands(model: QuantModel) -> dict[str, int]:
    return {name: one.num_bits for name, one in model.quantizers.items() if "input_quantizer_" in name}


def test_products_read_through_quantizers_of_their_own() -> None:
    model = papers(Tokens(), SOFTMAX)
    assert operands(model) == {
        "block.matmul_0.input_quantizer_0": 4,
        "block.matmul_0.input_quantizer_1": 4,
        "block.matmul_1.input_quantizer_0": 8,  # the softmax
        "block.matmul_1.input_quantizer_1": 4,
    }
    rows = {row.name: row for row in model.coverage()}
    products = [(rows[name].input_bits, rows[name].weight_bits) for name in ("block.matmul_0", "block.matmul_1")]
    assert products == [(4, 4), (8, 4)]
    for name in ("block.add_0", "block.add_1"):
        assert (rows[name].input_bits, rows[name].output_bits) == (None, None), "residual sums are in float"
    assert summarize(rows.values()).multiply_adds == 1
    assert len(activation_quantizers(model.module.block)) == 4 + 4


def test_presets_mean_it() -> None:
    default = QuantModel.build(float_model(Tokens()), "W4A4")
    assert len(operands(default)) == 4 and default.scheme == papers(Tokens(), {}).scheme
    assert "products of attention" in default.scheme.describe()
    assert QuantModel.build(float_model(Tokens()), QuantScheme.parse("W4A16")).quantizers == {}


def test_null_leaves_products_in_float() -> None:
    model = papers(Tokens())
    assert not operands(model) and not any(isinstance(part, QuantScope) for part in model.modules())
    assert "block.scaled_dot_product_attention_0" in summarize(model.coverage()).in_float


def test_a_network_without_attention_is_built_as_before() -> None:
    asked, plain = QuantModel.build(float_model(Network()), "W4A4"), papers(Network())
    assert asked.scheme == plain.scheme and "attention" not in asked.scheme.model_dump_json()
    assert asked.quantizers.keys() == plain.quantizers.keys() and asked.reads == plain.reads
    assert not any(isinstance(part, QuantScope) for part in asked.modules())


def test_a_softmax_has_the_bits_of_activations_unless_it_names_others() -> None:
    kind = QuantScheme.parse({"preset": "W6A5", "attention": {"softmax": {"kind": "log_sqrt2"}}}).attention
    assert (
        kind is not None and kind.softmax is not None and (kind.softmax.num_bits, kind.softmax.kind) == (5, "log_sqrt2")
    )
    named = QuantScheme.parse({"preset": "W6A5", "attention": SOFTMAX}).attention
    assert named is not None and named.softmax is not None and named.softmax.num_bits == 8


def test_a_softmax_that_is_not_there_is_named() -> None:
    with pytest.raises(
        SchemeError, match=r"^Network: .* no attention was found: of the \d+ operations outside of layers"
    ):
        papers(Network(), SOFTMAX)


class Product(nn.Module):
    """One attention of one head over 4 positions, its two products written in one of several ways."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.patch, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.form == "fused":
            x = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        elif self.form == "einsum":
            scores = torch.einsum("bqc, bkc -> bqk", q, k) / math.sqrt(8)
            x = torch.einsum("bqk, bkc -> bqc", [scores.softmax(-1), v])
        elif self.form == "baddbmm":
            scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), alpha=1 / math.sqrt(8))
            x = torch.bmm(F.dropout(scores.softmax(-1), 0.5, self.training), mat2=v)
        else:
            x = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v
        return self.head(x.mean(1))


FORMS = "matmul", "fused", "einsum", "baddbmm"


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_both_factors_of_both_products_are_rounded(form: str) -> None:
    model = papers(Product(form), SOFTMAX)
    bits = list(operands(model).values())
    assert bits == [4, 4, 8, 4]
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    query, key, softmax, value = grids = [one for name, one in model.quantizers.items() if name in operands(model)]
    for one in grids:
        one.fix(0.0, 1.0) if one is softmax else one.fix(-1.0, 1.5)
    with model.mode(weights=False, activations=False):
        for one in grids:
            one.enabled = True
        found = model(x)
        net = model.module
        tokens = net.patch(x).flatten(2).transpose(1, 2)
        scores = query(net.q(tokens)) @ key(net.k(tokens)).transpose(1, 2) / math.sqrt(8)
        wanted = net.head((softmax(scores.softmax(-1)) @ value(net.v(tokens))).mean(1))
        assert torch.allclose(found, wanted, atol=1e-6)
        for one in grids:  # each of them matters
            one.enabled = False
            assert not torch.allclose(model(x), wanted, atol=1e-5)
            one.enabled = True


def test_patterns_name_products_and_softmaxes() -> None:
    model = papers(Tokens(), {}, ignore=["block.matmul_0"])
    assert list(operands(model)) == ["block.matmul_1.input_quantizer_0", "block.matmul_1.input_quantizer_1"]
    six = {"input_activations": {"num_bits": 6}}
    model = papers(Tokens(), SOFTMAX, overrides={"*.matmul_1": six, "*.softmax_0": {"input_activations": None}})
    assert operands(model) == {
        "block.matmul_0.input_quantizer_0": 4,
        "block.matmul_0.input_quantizer_1": 4,
        "block.matmul_1.input_quantizer_1": 6,
    }
    assert {row.name: row for row in model.coverage()}["block.matmul_1"].reason == "computed outside of layers"
    with pytest.raises(SchemeError, match=r"pattern 'block\.matmul_0' matches no layer"):
        papers(Tokens(), ignore=["block.matmul_0"])
    with pytest.raises(SchemeError, match=r"pattern 'block\.add_0' matches no layer"):
        papers(Tokens(), {}, ignore=["block.add_0"])


class Pooling(nn.Module):
    """A learned query, which is no data, over tokens that a layer reads too; and a product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head, self.q = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5), nn.Linear(8, 8)
        self.query, self.mixer = nn.Parameter(torch.ones(1, 8)), nn.Parameter(torch.ones(8, 8))
        self.side = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = (self.q(self.query) @ x.transpose(1, 2)).softmax(-1) @ x + self.side(x).mean(1, keepdim=True)
        return self.head((x @ self.mixer)[:, 0])


def test_learned_queries_count_and_parameters_do_not() -> None:
    model = papers(Pooling(), {}, ends="same")
    assert list(operands(model)) == [
        "matmul_0.input_quantizer_0",
        "matmul_0.input_quantizer_1",
        "matmul_1.input_quantizer_0",
    ]
    assert model.operations and model.reads["side"] == "side.input_quantizer"
    scope = model.module
    assert scope.operand_quantizers["matmul_1"][1] is model.quantizers["side.input_quantizer"], "the very same tensor"
    rows = {row.name: row for row in model.coverage()}
    assert rows["matmul_0"].reason == rows["matmul_1"].reason == ""
    assert rows["mixer"].weight_bits is None


class Decoder(nn.Module):
    """Learned queries that attend to one another before they see data."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
        self.query, self.decoder = nn.Parameter(torch.ones(1, 2, 8)), nn.TransformerDecoderLayer(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.decoder(self.query.expand(x.shape[0], -1, -1), x).mean(1))


@pytest.mark.parametrize("deploy", ["papers", "full"])
def test_queries_that_attend_to_one_another(deploy: str) -> None:
    rows = papers(Decoder(), {}, deploy=deploy).coverage()
    products = [(row.input_bits, row.weight_bits) for row in rows if row.kind == "matmul"]
    assert products == [(4, 4)] * 4


class Twice(nn.Module):
    """A block with attention that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Tokens()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens.patch(x).flatten(2).transpose(1, 2)
        return self.tokens.head(self.tokens.block(self.tokens.block(x)).mean(1))


def test_a_block_that_runs_twice_reads_alike_each_time() -> None:
    assert len(operands(papers(Twice(), {}))) == 4


class Moody(Product):
    """Attends once more for larger batches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + super().forward(x) if len(x) > 3 else y


def test_operations_that_change_are_an_error() -> None:
    model = papers(Moody("matmul"), {})
    with (
        model.mode(weights=False, activations=False),
        pytest.raises(UnsupportedModelError, match="ran 'matmul' 4 times, not 2 times"),
    ):
        model(torch.ones(4, 3, 8, 8))


def test_under_deploy_full_it_says_what_the_softmax_is() -> None:
    model = papers(Tokens(), SOFTMAX, deploy="full")
    assert (model.quantizers["block.softmax_0"].num_bits, model.quantizers["block.gelu_0"].num_bits) == (8, 4)
    assert papers(Tokens(), deploy="full").quantizers["block.softmax_0"].num_bits == 4


def test_the_scheme_says_so() -> None:
    plain = QuantScheme.parse({"preset": "W4A4", "attention": None})
    assert "attention" not in plain.model_dump_json() and "attention" not in plain.describe()
    # files from before there was attention, and those that leave it out since, name no preset
    assert QuantScheme.parse(plain.model_dump()) == plain != QuantScheme.parse("W4A4")
    assert QuantScheme.parse({"preset": "W4A4", "input_activations": None}).attention is None
    asked = QuantScheme.parse({"preset": "W4A4", "attention": SOFTMAX})
    assert "products of attention, softmax 8 bit asymmetric per tensor" in asked.describe()
    assert QuantScheme.parse(asked.model_dump()) == asked
    with pytest.raises(SchemeError, match="attention quantizes activations: give input_activations"):
        QuantScheme.parse({"preset": "W4A16", "attention": {}})
    with pytest.raises(SchemeError, match="cannot have 9 bits"):
        QuantScheme.parse({"preset": "W4A4", "attention": {"softmax": {"num_bits": 9}}})


def test_every_product_of_the_bundled_transformer() -> None:
    model = QuantModel.build(open_model("zoo/cifar10-vit"), QuantScheme.parse({"preset": "W4A4", "attention": {}}))
    rows = model.coverage()
    products = [row for row in rows if row.kind == "matmul"]
    assert products and {(row.input_bits, row.weight_bits, row.reason) for row in products} == {(4, 4, "")}
    sums = [row for row in rows if row.kind == "add" and row.macs == 0]
    assert sums and {(row.input_bits, row.weight_bits, row.output_bits) for row in sums} == {(None, None, None)}
    assert summarize(rows).multiply_adds == 1


def attention_of_timm(fused: bool) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=5)
    network.blocks[0].attn.fused_attn = fused
    return network


class Logits(nn.Module):
    """A classifier of transformers as a map to logits."""

    def __init__(self, form: str) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5, attn_implementation=form)
        self.network = ViTForImageClassification(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x).logits


@pytest.mark.parametrize("name", ["timm fused", "timm", "transformers sdpa", "transformers eager", "torch"])
def test_attention_of_the_libraries(name: str) -> None:
    library, _, form = name.partition(" ")
    if library != "torch":
        pytest.importorskip(library)
    made = {"timm": lambda: attention_of_timm(bool(form)), "transformers": lambda: Logits(form), "torch": Encoder}
    model = papers(made[library](), SOFTMAX)
    assert list(operands(model).values()) == [4, 4, 8, 4]
    assert summarize(model.coverage()).multiply_adds == 1
