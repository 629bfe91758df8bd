"""Torch's attention as layers and visible products: the same numbers, in layers that are quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.nn.networks import Encoder, float_model
from tests.small_networks import calibrated_model
from torch import nn
from torch.nn.utils import parametrizations

from synthquant.core.errors import UnsupportedModelError
from synthquant.nn.build import folded_copy
from synthquant.nn.called_layers import LayerCaller
from synthquant.nn.rewrites import project_in_layers

WIDTH, HEADS, LENGTH, KEYS, BATCH = 8, 2, 5, 7, 3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(**options: Any) -> nn.MultiheadAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options).eval().requires_grad_(False)
        for parameter in module.parameters():  # biases start at 0
            parameter.normal_()
    return module


FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"batch_first": True}, {"need_weights": False}),
    ({"bias": False}, {"average_attn_weights": False}),
    ({"kdim": 4, "vdim": 6, "batch_first": True}, {}),
    ({"kdim": 4, "vdim": 6, "bias": False}, {"need_weights": False}),
    ({}, {"attn_mask": random(LENGTH, KEYS, seed=3) > 0.5}),
    ({"batch_first": True}, {"attn_mask": random(BATCH * HEADS, LENGTH, KEYS, seed=3), "need_weights": False}),
    ({}, {"key_padding_mask": random(BATCH, KEYS, seed=4) > 0.5, "attn_mask": random(LENGTH, KEYS, seed=3) > 0.9}),
    ({"add_bias_kv": True}, {"key_padding_mask": random(BATCH, KEYS, seed=4)}),
    (
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
        {"attn_mask": random(LENGTH, KEYS, seed=3) > 0.5, "need_weights": False},
    ),
    ({"add_zero_attn": True}, {"key_padding_mask": random(BATCH, KEYS, seed=4) > 0.5}),
]


@pytest.mark.parametrize(("made", "called"), FORMS)
@torch.no_grad()
def test_attention_computes_what_torch_computes(made: dict[str, Any], called: dict[str, Any]) -> None:
    module = attention(**made)
    widths = WIDTH, made.get("kdim", WIDTH), made.get("vdim", WIDTH)
    given = [
        random(BATCH, length, width, seed=width) for length, width in zip((LENGTH, KEYS, KEYS), widths, strict=True)
    ]
    if not made.get("batch_first"):
        given = [tensor.transpose(0, 1) for tensor in given]
    wanted, weights = module(*given, **called)
    project_in_layers(module)
    found, found_weights = module(*given, **called)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert (weights is None) == (found_weights is None)
    assert weights is None or torch.allclose(found_weights, weights, atol=1e-12)


@torch.no_grad()
def test_attention_without_a_batch() -> None:
    module, x = attention(), random(LENGTH, WIDTH)
    mask = {"key_padding_mask": torch.arange(LENGTH) > 3, "attn_mask": random(HEADS, LENGTH, LENGTH, seed=1) > 1}
    wanted = module(x, x, x, **mask)
    project_in_layers(module)
    assert all(
        torch.allclose(one, other, atol=1e-12) for one, other in zip(module(x, x, x, **mask), wanted, strict=True)
    )


def test_attention_that_is_trained_drops_weights() -> None:
    module, x = attention(dropout=0.5), random(LENGTH, BATCH, WIDTH)
    project_in_layers(module)
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    assert not torch.equal(module.train()(x, x, x)[0], module.eval()(x, x, x)[0])


class Outside(nn.Module):
    """Something that nobody but torch's forward may use, used by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.attention, self.idle = attention(batch_first=True).float(), attention().float()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = nn.functional.linear(x, self.attention.in_proj_weight)[..., :WIDTH]
        return self.head((x + self.attention(x, x, x)[0]).mean(1))


def test_weights_that_others_use_or_compute_stay_where_they_are() -> None:
    copied = folded_copy(float_model(Outside()))[0]
    assert not hasattr(copied.attention, "q_proj") and not hasattr(copied.idle, "q_proj")
    computed = parametrizations.weight_norm(attention(), "in_proj_weight")
    project_in_layers(computed)
    assert type(computed).forward is nn.MultiheadAttention.forward


@torch.no_grad()
def test_a_copy_of_torch_s_encoder_runs_in_layers() -> None:
    network = float_model(nn.Sequential(Encoder()))
    copied = folded_copy(network)[0]
    names = {name for name, part in copied.named_modules() if isinstance(part, nn.Linear)}
    assert {f"0.encoder.self_attn.{name}_proj" for name in ("q", "k", "v", "out")} <= names
    x = network.example_images(4)
    assert torch.allclose(copied(x), network.module(x), atol=1e-5)
    assert network.module[0].encoder.self_attn.in_proj_weight is not None, "the network itself is as it was"


class Padded(nn.Module):
    """An encoder of tokens, the last of them padding, that reads all that the encoder puts out."""

    def __init__(self, layers: int = 1, **options: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)
            self.patches, self.encoder = nn.Conv2d(3, WIDTH, 4, 4), nn.TransformerEncoder(layer, layers, **options)
            self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        padding = torch.arange(tokens.shape[1]).expand(len(x), -1) == tokens.shape[1] - 1
        logits: torch.Tensor = self.head(self.encoder(tokens, src_key_padding_mask=padding).mean(1))
        return logits


def test_an_encoder_whose_padding_torch_puts_to_zero_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="enable_nested_tensor=False"):
        folded_copy(float_model(Padded()))
    model = float_model(Padded(enable_nested_tensor=False))
    copied, _ = folded_copy(model)
    images = model.example_images(2)
    with torch.no_grad():
        assert torch.allclose(copied(images), model.module(images), atol=1e-5)


class ByFunction(nn.Module):
    """Hands weights of its layers to functions, as torchvision's Swin does."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, WIDTH, 4, stride=4), nn.Linear(WIDTH, 5)
        self.block = Functions(form)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class Functions(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.inner, self.outer = form, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.first_half = nn.Parameter(torch.linspace(-1, 1, WIDTH // 2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = nn.functional.linear
        bias: torch.Tensor | None = self.inner.bias
        if self.form == "a changed bias":  # torchvision's Swin V2
            bias = self.inner.bias.clone()
            bias[: WIDTH // 2].zero_()
        elif self.form == "a bias of the input":
            bias = self.inner.bias + x.mean()
        elif self.form == "no bias":
            bias = None
        x = torch.relu(linear(x, self.inner.weight, bias))
        if self.form == "twice":
            x = linear(x, self.inner.weight, self.inner.bias)
        if self.form == "one runs":
            return self.outer(x)
        if self.form == "a joined bias":  # timm's BEiT
            return linear(x, weight=self.outer.weight, bias=torch.cat((self.first_half, self.first_half)))
        return linear(input=x, weight=self.outer.weight)


@pytest.mark.parametrize("form", ["plain", "a changed bias", "a joined bias", "one runs"])
@torch.no_grad()
def test_layers_run_whose_weights_a_function_multiplies(form: str) -> None:
    network = float_model(ByFunction(form))
    model = calibrated_model(network)
    assert {"block.inner", "block.outer"} <= model.layers.keys() & model.reads.keys()
    x = network.example_images(4)
    with model.mode(weights=False, activations=False):
        assert torch.allclose(model(x), network.module(x), atol=1e-6)
    for name in ("block.inner", "block.outer"):
        ran, quantizer = model(x), model.layers[name].weight_quantizer
        assert quantizer is not None
        codes = quantizer.codes.clone()
        quantizer.codes.zero_()
        assert not torch.allclose(model(x), ran), "its codes are what is multiplied"
        quantizer.codes.copy_(codes)


@pytest.mark.parametrize("form", ["a bias of the input", "no bias", "twice"])
def test_functions_that_do_something_else_stay(form: str) -> None:
    copied = folded_copy(float_model(ByFunction(form)))[0]
    assert not isinstance(copied.block, LayerCaller)
