"""What the attentions of a network compute, and the patches of an image in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    """

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see
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
                    self._see(result)
        return result

    def _multi_head(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the function that hides its products with an identity as its last layer, and that layer afterwards."""
        given = inspect.signature(func).bind(*args, **kwargs)
        query, heads = given.arguments["query"], given.arguments["num_heads"]
        weight, bias = given.arguments["out_proj_weight"], given.arguments["out_proj_bias"]
        given.arguments["out_proj_weight"] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        given.arguments["out_proj_bias"] = None
        joined, weights = func(*given.args, **given.kwargs)
        if query.ndim == 3:  # [tokens, B, heads * d]
            self._see(joined.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3))
        return F.linear(joined, weight, bias), weights


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
    if output.ndim == 3 and len(output) == images:  # one head
        output = output[:, None]
    if output.ndim == 5 and len(output) == images:  # windows in a dimension of their own
        output = output.flatten(0, 1)
    if output.ndim != 4 or len(output) % images:
        return None
    tokens = output.float().mean(1)
    if len(tokens) == images:
        patches = _patches_among(tokens.shape[1], input_size)
        tokens = tokens[:, tokens.shape[1] - patches :]
    return tokens if tokens.shape[1] > 1 else None


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
