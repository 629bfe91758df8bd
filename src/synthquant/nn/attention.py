"""Attention as two matrix products and a softmax, so that each of them can be quantized."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def attention_weights(
    query: torch.Tensor, key: torch.Tensor, masks: Sequence[torch.Tensor] = (), scale: float | None = None
) -> torch.Tensor:
    """How much each position attends to each: the softmax of scaled products.

    The scale is applied to the product rather than to the query, so that the product reads query and key as they are.

    Args:
        query: `[..., L, E]`.
        key: `[..., S, E]`.
        masks: broadcastable to `[..., L, S]`; True where attention is not allowed, or numbers to be added.
        scale: factor of the product; by default `1 / sqrt(E)`.

    Returns:
        `[..., L, S]`.
    """
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    for mask in masks:
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1)


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
    masks = []
    if is_causal:
        allowed = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
        masks.append(allowed.logical_not())
    if attn_mask is not None:
        masks.append(attn_mask.logical_not() if attn_mask.dtype == torch.bool else attn_mask)
    weights = attention_weights(query, key, masks, scale)
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, train=True)
    return torch.matmul(weights, value)
