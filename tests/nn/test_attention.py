"""Attention step by step against torch's own kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from synthquant.nn.attention import visible_attention


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": random(1, 1, 5, 7, seed=3)},
        {"attn_mask": random(2, 1, 5, 7, seed=3) > -0.5},
        {"attn_mask": random(5, 7, seed=4), "scale": 2.0, "dropout_p": 0.0},
    ],
)
def test_equals_the_fused_kernel(options: dict[str, Any]) -> None:
    query, key, value = random(2, 3, 5, 4), random(2, 3, 7, 4, seed=1), random(2, 3, 7, 6, seed=2)
    wanted = F.scaled_dot_product_attention(query, key, value, **options)
    assert torch.allclose(visible_attention(query, key, value, **options), wanted, atol=1e-6)


def test_heads_of_key_and_value_can_be_shared() -> None:
    query, key, value = random(2, 4, 5, 4), random(2, 2, 7, 4, seed=1), random(2, 2, 7, 6, seed=2)
    wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.allclose(visible_attention(query, key, value, enable_gqa=True), wanted, atol=1e-6)


def test_attention_weights_are_dropped_with_their_probability() -> None:
    query, key, value = random(1, 1, 50, 4), random(1, 1, 60, 4), torch.ones(1, 1, 60, 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = visible_attention(query, key, value, dropout_p=0.5)
    assert float(dropped.std()) > 0.01 and abs(float(dropped.mean()) - 1) < 0.1
