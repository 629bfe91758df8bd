"""Modules that multiply by functions, as equal modules that multiply in layers and in products that can be seen.

A rewrite is a function, registered for a class of module, that changes such a module in place: it keeps its name, its
attributes and what it computes, and its forward calls layers. It is applied while a network is copied, before anything
else looks at the copy.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from synthquant.core.errors import UnsupportedModelError
from synthquant.models.signature import Inputs
from synthquant.models.trace import Trace, trace
from synthquant.nn.attention import attention_weights
from synthquant.nn.called_layers import call_layers, layer_callers
from synthquant.nn.derived import derived_class

Rewrite = Callable[[nn.Module], None]

_TOLERANCE = 1e-3
"""Largest difference of outputs, as a share of the largest value, that rounding may make."""

REWRITES: OrderedDict[type[nn.Module], Rewrite] = OrderedDict()
"""What is done with modules of a class, and of those derived from it that have its forward; in this order."""


def rewrites(kind: type[nn.Module]) -> Callable[[Rewrite], Rewrite]:
    """Return a decorator that registers a rewrite for a class."""

    def enter(rewrite: Rewrite) -> Rewrite:
        REWRITES[kind] = rewrite
        return rewrite

    return enter


def make_visible(network: nn.Module, example: Inputs | Tensor) -> None:
    """Apply all rewrites to a network, in place, and let layers run whose weights a function multiplies.

    A module stays as it is if its class has a forward of its own, if it is not called, or if something outside of it
    computes with its parameters.

    Args:
        network: the network, in eval mode.
        example: some samples.

    Raises:
        UnsupportedModelError: the network computes something else then.
    """
    known: list[Tensor] = []
    for kind, rewrite in REWRITES.items():
        found = {name: part for name, part in network.named_modules() if _runs_forward_of(part, kind)}
        if not found:
            continue
        known = known or _outputs(network, example)
        seen = trace(network, example)
        for name, part in found.items():
            if _keeps_to_itself(seen, name, part):
                rewrite(part)
    callers = layer_callers(network, trace(network, example))
    known = known or (_outputs(network, example) if callers else [])
    if callers:
        call_layers(network, callers, example)
    if known:
        _require_same(_outputs(network, example), known)


@torch.no_grad()
def _outputs(network: nn.Module, example: Inputs | Tensor) -> list[Tensor]:
    inputs = Inputs.of(example) if isinstance(example, Tensor) else example
    outputs = pytree.tree_leaves(inputs.clone().call(network))
    return [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _require_same(found: list[Tensor], known: list[Tensor]) -> None:
    for one, other in zip(found, known, strict=True):
        limit = _TOLERANCE * float(other.nan_to_num().abs().max()) if other.numel() else 0.0
        if not torch.allclose(one, other, rtol=0.0, atol=limit, equal_nan=True):
            raise UnsupportedModelError(
                "the network computes something else with its attention as layers and products; most often torch's"
                " encoder puts zeros in place of padded tokens when it is not trained, and the network reads them:"
                " build it with enable_nested_tensor=False"
            )


def _runs_forward_of(part: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(part, kind) and type(part).forward is kind.forward


def _keeps_to_itself(seen: Trace, name: str, part: nn.Module) -> bool:
    """Whether a module is called, and all that computes with its parameters runs in its calls."""
    values = [seen.parameters[f"{name}.{key}".lstrip(".")] for key, _ in part.named_parameters()]
    return bool(seen.calls(name)) and all(
        any(call.name == name for call in seen.enclosing(operation.call))
        for value in values
        for operation in seen.consumers(value)
    )


@rewrites(nn.TransformerEncoderLayer)
def run_layers_one_by_one(part: nn.Module) -> None:
    """Keep torch's encoder layer from a fused kernel that reads its layers' weights and never calls them."""
    cast(nn.TransformerEncoderLayer, part).activation_relu_or_gelu = 0


@rewrites(nn.TransformerEncoder)
def keep_padding(part: nn.Module) -> None:
    """Keep torch's encoder from nested tensors, which only a fused kernel takes and which lose what padding held."""
    cast(nn.TransformerEncoder, part).use_nested_tensor = False


class LayeredAttention(nn.Module):
    """`torch.nn.MultiheadAttention` whose projections are layers and whose products are its own operations.

    Attributes:
        q_proj: what makes the query.
        k_proj: what makes the key.
        v_proj: what makes the value.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    num_heads: int
    dropout: float
    batch_first: bool
    bias_k: Tensor | None
    bias_v: Tensor | None
    add_zero_attn: bool

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What torch's forward computes, up to rounding, with all of its arguments.

        Args:
            query: `[L, B, E]`, with `batch_first` `[B, L, E]`, or without a batch `[L, E]`.
            key: the same with `S` for `L`.
            value: the same with `S` for `L`.
            key_padding_mask: `[B, S]` or `[S]`; True where a key is not to be seen, or numbers to be added.
            need_weights: return the attention weights too.
            attn_mask: `[L, S]` or `[B * heads, L, S]`; True where attention is not allowed, or numbers to be added.
            average_attn_weights: return their mean over the heads.
            is_causal: a hint that `attn_mask` is causal; torch requires the mask itself as well.

        Returns:
            The output, shaped as the query, and the weights, `[B, L, S]` or `[B, heads, L, S]`, or none.
        """
        batched = query.ndim == 3
        # In the layout in which they come: three layers that read one tensor are seen to do so.
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if not batched:
            projected = tuple(one.unsqueeze(0) for one in projected)
        elif not self.batch_first:
            projected = tuple(one.transpose(0, 1) for one in projected)
        q, k, v = projected
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = nn.functional.pad(k, (0, 0, 0, 1)), nn.functional.pad(v, (0, 0, 0, 1))
        q, k, v = (torch.unflatten(one, -1, (self.num_heads, -1)).transpose(1, 2) for one in (q, k, v))
        weights = attention_weights(q, k, self._masks(attn_mask, key_padding_mask))
        if self.dropout and self.training:
            weights = nn.functional.dropout(weights, self.dropout)
        output = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        output = self.out_proj(output)
        if not need_weights:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights.squeeze(0)

    def _masks(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> list[Tensor]:
        """The masks as `[..., heads or 1, L or 1, S]`, with a column for each key that was added."""
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.ndim == 2 else torch.unflatten(attn_mask, 0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            masks.append(key_padding_mask[..., None, None, :])
        added = (self.bias_k is not None) + bool(self.add_zero_attn)
        return [nn.functional.pad(mask, (0, added)) for mask in masks] if added else masks


@rewrites(nn.MultiheadAttention)
def project_in_layers(part: nn.Module) -> None:
    """Give torch's attention a layer for each of its projections; a computed weight stays where it is."""
    attention = cast(nn.MultiheadAttention, part)
    own = attention._parameters
    packed = own.get("in_proj_weight")
    weights = [own.get(f"{name}_proj_weight") for name in "qkv"] if packed is None else list(packed.chunk(3))
    if any(weight is None for weight in weights) or "in_proj_bias" not in own:
        return
    packed_bias = own["in_proj_bias"]
    biases = [None] * 3 if packed_bias is None else packed_bias.chunk(3)
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        attention.add_module(f"{name}_proj", _linear(cast(Tensor, weight), bias))
    # Without them, torch's encoder does not use its fused kernel either.
    for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        own[name] = None
    part.__class__ = derived_class(LayeredAttention, type(part), prefix="Layered")


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return layer
