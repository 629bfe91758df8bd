"""What the attentions of a network compute, and the patches of an image in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from synthquant.models.operation_names import operation_name

# Class, distillation and register tokens together: with patches that cut the image evenly, and with a rest at its edge.
# Where more are left over, tokens are no patches: attention may also run over channels.
_MOST_PREFIX_TOKENS = 8
_MOST_PREFIX_TOKENS_UNEVEN = 2
# What attention weights may go through between the softmax and the product with the values.
_UNCHANGED = frozenset(("dropout", "to", "type", "type_as", "float", "half", "bfloat16", "contiguous"))
_PRODUCTS = frozenset(("matmul", "bmm", "einsum"))


class Attentions(TorchFunctionMode):
    """Hands on what every attention computes while it is entered: weights times values, `[..., heads, tokens, d]`.

    Attention is found by what the network computes, whatever its modules are called: `scaled_dot_product_attention`, a
    product of matrices with a softmax on its left, or `multi_head_attention_forward`. Attention that mixes its heads
    after the softmax (CaiT) is not found. What is handed on carries gradients if the network's pass does.

    `see_weights` is handed the weights themselves, `[..., heads, tokens, tokens]`, before `see` is handed the product.
    Fused functions do not give theirs away, so they are computed once more for it.
    """

    def __init__(self, see: Callable[[Tensor], None], see_weights: Callable[[Tensor], None] | None = None) -> None:
        super().__init__()
        self._see = see
        self._see_weights = see_weights
        self._weights: dict[int, Tensor] = {}  # by identity, kept alive so that no other tensor gets it

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func)
        if name == "multi_head_attention_forward":
            return self._multi_head(func, args, kwargs)
        result = func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            if self._see_weights is not None:
                self._see_weights(_fused_weights(*args, **kwargs))
            self._see(result)
        elif name == "softmax":
            self._weights[id(result)] = result
        elif name in _PRODUCTS or name in _UNCHANGED:
            left = args[1 if name == "einsum" else 0] if len(args) > (name == "einsum") else None
            if self._weights.get(id(left)) is not None:
                del self._weights[id(left)]
                if name in _UNCHANGED:
                    self._weights[id(result)] = result
                else:
                    if self._see_weights is not None:
                        self._see_weights(cast(Tensor, left))
                    self._see(result)
        return result

    def _multi_head(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the function that hides its products with an identity as its last layer, and that layer afterwards."""
        given = inspect.signature(func).bind(*args, **kwargs)
        query, heads = given.arguments["query"], given.arguments["num_heads"]
        weight, bias = given.arguments["out_proj_weight"], given.arguments["out_proj_bias"]
        given.arguments["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        given.arguments["out_proj_bias"] = None
        given.apply_defaults()
        wanted, averaged = given.arguments["need_weights"], given.arguments["average_attn_weights"]
        if self._see_weights is not None:
            given.arguments["need_weights"], given.arguments["average_attn_weights"] = True, False
        joined, weights = func(*given.args, **given.kwargs)
        if query.ndim == 3:  # [tokens, B, heads * d]
            if self._see_weights is not None:
                self._see_weights(weights)
            self._see(joined.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3))
        if self._see_weights is not None:
            weights = (weights.mean(-3) if averaged else weights) if wanted else None
        return F.linear(joined, weight, bias), weights


def _fused_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights with which `scaled_dot_product_attention` multiplies the values, before dropout."""
    del value, dropout_p
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)


def patch_weights(weights: Tensor, images: int, input_size: tuple[int, int]) -> Tensor | None:
    """Return what patches take of each other, `[B * windows, heads, N, N]`, of an attention's weights; none if nothing.

    Args:
        weights: `[B, heads, tokens, tokens]`, with windows as `patch_tokens` takes them.
        images: `B`.
        input_size: height and width of the network's input [pixels].
    """
    by_image = _of_images(weights, images)
    if by_image is None or by_image.shape[2] != by_image.shape[3]:
        return None
    first = _first_patch(by_image, images, input_size)
    patches = by_image[:, :, first:, first:].float()
    return patches if patches.shape[2] > 1 else None


def patch_tokens(output: Tensor, images: int, input_size: tuple[int, int]) -> Tensor | None:
    """Return the patches `[B * windows, N, d]` of what an attention puts out, averaged over heads; none if it has none.

    Args:
        output: `[B, heads, tokens, d]`, `[B, tokens, d]`, `[B, windows, heads, tokens, d]`, or `[B * windows, heads,
            tokens, d]` with an image's windows one after another.
        images: `B`.
        input_size: height and width of the network's input [pixels].

    Without windows, the tokens that lead a grid of patches (class, distillation, registers) are dropped. Their number
    follows from that of all tokens: the largest grid of square patches that the image can be cut into is the patches.
    """
    by_image = _of_images(output, images)
    if by_image is None:
        return None
    tokens = by_image.float().mean(1)
    tokens = tokens[:, _first_patch(by_image, images, input_size) :]
    return tokens if tokens.shape[1] > 1 else None


def _of_images(tensor: Tensor, images: int) -> Tensor | None:
    """`[B * windows, heads, tokens, d]` in all its forms; none if it is in none of them."""
    if tensor.ndim == 3 and len(tensor) == images:  # one head
        tensor = tensor[:, None]
    if tensor.ndim == 5 and len(tensor) == images:  # windows in a dimension of their own
        tensor = tensor.flatten(0, 1)
    return None if tensor.ndim != 4 or len(tensor) % images else tensor


def _first_patch(by_image: Tensor, images: int, input_size: tuple[int, int]) -> int:
    """How many of the tokens of `[B * windows, heads, tokens, d]` lead the patches; all if none is a patch."""
    tokens = by_image.shape[2]
    return tokens - _patches_among(tokens, input_size) if len(by_image) == images else 0


def _patches_among(tokens: int, input_size: tuple[int, int]) -> int:
    """How many of the tokens are the patches of an image, 0 if none."""
    height, width = input_size
    found = 0
    for patch in range(1, min(input_size) + 1):
        grid = (height // patch) * (width // patch)
        most = _MOST_PREFIX_TOKENS_UNEVEN if height % patch or width % patch else _MOST_PREFIX_TOKENS
        if 0 <= tokens - grid <= most:
            found = max(found, grid)
    return found
