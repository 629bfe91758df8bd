"""How diverse the patches of an image look to a vision transformer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from synthquant.core.errors import UnsupportedModelError
from synthquant.core.modules import eval_mode
from synthquant.methods import SELECTORS
from synthquant.models.operation_names import operation_name
from synthquant.select.filter import Filter, unfit

if TYPE_CHECKING:
    from synthquant.methods import Candidates
    from synthquant.models.float_model import FloatModel

_BANDWIDTH = 0.01
_DENSITY_FLOOR = 1e-4
# Class, distillation and register tokens together: with patches that cut the image evenly, and with a rest at its edge.
# Where more are left over, tokens are no patches: attention may also run over channels.
_MOST_PREFIX_TOKENS = 8
_MOST_PREFIX_TOKENS_UNEVEN = 2
# What attention weights may go through between the softmax and the product with the values.
_UNCHANGED = frozenset(("dropout", "to", "type", "type_as", "float", "half", "bfloat16", "contiguous"))
_PRODUCTS = frozenset(("matmul", "bmm", "einsum"))
_LACKS = "no attention between the patches of an image"


def similarity_entropy(similarities: Tensor, points: int = 512) -> Tensor:
    """Return the entropy [nats] of the density of each row, `[R]`, of cosine similarities `[R, M]`.

    `H = -int f ln f` with a Gaussian kernel density estimate `f` (bandwidth 0.01, plus 1e-4) on `points` grid points
    between the row's own smallest and largest value, by the trapezoidal rule: PSAQ-ViT (arXiv:2203.02250) with its
    constants. Values are rounded to the grid first, and the kernel is applied to their histogram: the cost is that of
    one pass over the values, where the direct sum costs `points` times as much. A row that is not finite gets NaN.
    """
    low, high = similarities.amin(1, keepdim=True), similarities.amax(1, keepdim=True)
    step = ((high - low) / (points - 1)).clamp_min(torch.finfo(torch.float32).tiny)
    places = ((similarities - low) / step).nan_to_num_().round_().clamp_(0, points - 1).long()
    counts = torch.zeros(len(places), points, device=places.device)
    counts.scatter_add_(1, places, torch.ones_like(similarities))
    # Circular convolution on twice the points: what wraps around falls outside.
    offsets = torch.arange(2 * points, device=places.device)
    distance = torch.minimum(offsets, 2 * points - offsets) * step / _BANDWIDTH
    kernel = torch.exp(-0.5 * distance.square()) / (_BANDWIDTH * (2 * torch.pi) ** 0.5)
    spectrum = torch.fft.rfft(counts, n=2 * points) * torch.fft.rfft(kernel)
    density = torch.fft.irfft(spectrum, n=2 * points)[:, :points] / similarities.shape[1]
    density = density.clamp(min=0) + _DENSITY_FLOOR
    surprise = -density * density.log()
    entropy: Tensor = (surprise.sum(1) - 0.5 * (surprise[:, 0] + surprise[:, -1])) * step[:, 0]
    return entropy


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


@SELECTORS.register("patch_similarity")
class PatchSimilarity(Filter):
    """Patch similarity filtering of GenQ for vision transformers (arXiv:2312.05272, Eq. 8 and 9).

    Keeps the images of the highest entropy of the cosine similarities between all pairs of an image's patches, summed
    over all attention blocks: noise looks alike everywhere, photographs do not. GenQ names neither the layers nor the
    constants of the density; those of PSAQ-ViT (arXiv:2203.02250) are used: attention times values, averaged over
    heads, without class token. Departures from its code: the grid has `points` points between each image's own extremes
    instead of 10 between the batch's, and with windows (Swin) no patch is dropped for a class token.

    Attention is found by what the network computes, whatever its modules are called: `scaled_dot_product_attention`, a
    product of matrices with a softmax on its left, or `multi_head_attention_forward`. Attention that mixes its heads
    after the softmax (CaiT) is not found.
    """

    keeps_highest: ClassVar[bool] = True

    points: int = Field(default=512, ge=128)
    """Points of the grid that the density is computed on."""

    def supports(self, model: FloatModel) -> bool:
        """Whether patches meet in an attention; runs the network on 2 images of noise."""
        probe = PatchProbe(model, self.points)
        with torch.no_grad(), eval_mode(model.module), probe.watch(2):
            model.logits(model.example_input(2))
        return probe.found

    def probe(self, model: FloatModel) -> PatchProbe:
        """Return what watches the attentions; raises `UnsupportedModelError` if there is none between patches."""
        if not self.supports(model):
            raise unfit(self, model, _LACKS)
        return PatchProbe(model, self.points)

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the entropies; they depend on the image alone."""
        return candidates.table[candidates.chosen, 0].double()


class PatchProbe:
    """Rows of one number: the entropy of patch similarities, summed over attentions."""

    def __init__(self, model: FloatModel, points: int) -> None:
        self.name = f"patch similarity entropy on {points} points"
        self._model_name = model.name
        self._input_size = model.preprocess.input_size
        self._points = points
        self._images = 0
        self._entropy: Tensor | None = None

    @property
    def found(self) -> bool:
        """Whether the pass that was watched last had an attention between patches."""
        return self._entropy is not None

    @contextmanager
    def watch(self, count: int) -> Iterator[None]:
        """Look at every attention of the forward pass."""
        self._images, self._entropy = count, None
        with _Attentions(self._add):
            yield

    def rows(self, logits: Tensor) -> Tensor:
        """Return the entropies `[B, 1]`; raises `UnsupportedModelError` if no attention between patches ran."""
        if self._entropy is None:
            raise UnsupportedModelError(f"{self._model_name} has {_LACKS}, which patch_similarity needs")
        return self._entropy[:, None]

    def _add(self, output: Tensor) -> None:
        tokens = patch_tokens(output, self._images, self._input_size)
        if tokens is None:
            return
        tokens = F.normalize(tokens, dim=-1)
        similarities = (tokens @ tokens.transpose(1, 2)).reshape(self._images, -1)
        entropy = similarity_entropy(similarities, self._points)
        self._entropy = entropy if self._entropy is None else self._entropy + entropy


class _Attentions(TorchFunctionMode):
    """Hands on what every attention computes: weights times values, `[..., heads, tokens, d]`."""

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
