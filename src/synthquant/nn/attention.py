"""Attention as two matrix products and a softmax, so that each of them can be quantized."""

from __future__ import annotations

import math

import torch


def visible_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` computes, step by step.

    The scale is applied to the product rather than to the query, so that the first product reads query and key as they
    are.

    Args:
        query: `[..., L, E]`.
        key: `[..., S, E]`.
        value: `[..., S, F]`.
        attn_mask: broadcastable to `[..., L, S]`; False (or minus infinity) where attention is not allowed.
        dropout_p: probability of dropping an attention weight.
        is_causal: let each position attend to itself and earlier ones only.
        scale: factor of the product; by default `1 / sqrt(E)`.
        enable_gqa: repeat the heads of key and value to match those of the query.

    Returns:
        `[..., L, F]`.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        allowed = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(allowed.logical_not(), -math.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf) if hidden else scores + attn_mask
    weights = torch.softmax(scores, -1)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, train=True)
    return torch.matmul(weights, value)
