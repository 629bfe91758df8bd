"""Text embeddings of a pipeline, computed once for each distinct prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CACHED_PROMPTS = 4096
"""Prompts whose embeddings are kept in main memory: about 0.5 GB for Stable Diffusion in half precision."""

# What `encode_prompt` of these pipelines returns for the prompt and for the negative prompt, by place, and the argument
# that takes it. Other pipelines get the prompts themselves and encode them in every call.
_PLAIN = (("prompt_embeds", 0),)
_NEGATIVE = (("negative_prompt_embeds", 1),)
_ENCODED: dict[str, tuple[tuple[tuple[str, int], ...], tuple[tuple[str, int], ...]]] = {
    "LatentConsistencyModelPipeline": (_PLAIN, ()),
    "StableDiffusionPipeline": (_PLAIN, _NEGATIVE),
    "StableDiffusionXLPipeline": (
        (*_PLAIN, ("pooled_prompt_embeds", 2)),
        (*_NEGATIVE, ("negative_pooled_prompt_embeds", 3)),
    ),
}


class TextCache:
    """Prompts to the arguments by which a pipeline takes their text."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self._names = _ENCODED.get(type(pipeline).__name__)
        self._prompts: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self._negatives: dict[str, tuple[Tensor, ...]] = {}

    def clear(self) -> None:
        """Forget everything: the text encoder has changed."""
        self._prompts.clear()
        self._negatives.clear()

    def arguments(self, prompts: Sequence[str], guidance: float, negative_prompt: str) -> dict[str, Any]:
        """Return the arguments of a call for these prompts, one image each."""
        if self._names is None:
            negative = {"negative_prompt": [negative_prompt] * len(prompts)} if negative_prompt else {}
            return {"prompt": list(prompts), **negative}
        of_prompt, of_negative = self._names
        found = self._embeddings(prompts)
        arguments = {name: self._stack([row[place] for row in found]) for place, (name, _) in enumerate(of_prompt)}
        if guidance > 1 and of_negative:
            row = self._negative(negative_prompt)
            for place, (name, _) in enumerate(of_negative):
                arguments[name] = self._stack([row[place]] * len(prompts))
        return arguments

    def is_cut(self, prompt: str) -> bool:
        """Return whether the pipeline's tokenizer cuts off the end of a prompt."""
        tokenizer = getattr(self._pipeline, "tokenizer", None)
        if tokenizer is None:
            return False
        return len(tokenizer(prompt, verbose=False).input_ids) > int(tokenizer.model_max_length)

    def _stack(self, rows: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(rows)).to(self._device)

    def _embeddings(self, prompts: Sequence[str]) -> list[tuple[Tensor, ...]]:
        assert self._names is not None
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        if missing:
            encoded = self._pipeline.encode_prompt(
                missing, device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            columns = [encoded[place].cpu() for _, place in self._names[0]]
            for row, prompt in enumerate(missing):
                self._prompts[prompt] = tuple(column[row].clone() for column in columns)
        rows = [self._prompts[prompt] for prompt in prompts]
        for prompt in prompts:
            self._prompts.move_to_end(prompt)
        while len(self._prompts) > CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return rows

    def _negative(self, text: str) -> tuple[Tensor, ...]:
        assert self._names is not None
        if text not in self._negatives:
            encoded = self._pipeline.encode_prompt(
                "",
                device=self._device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
                negative_prompt=text or None,  # Stable Diffusion XL reads no text otherwise than an empty one
            )
            self._negatives[text] = tuple(encoded[place][0].cpu() for _, place in self._names[1])
        return self._negatives[text]
