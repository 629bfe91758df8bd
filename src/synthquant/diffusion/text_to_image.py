"""Text-to-image pipelines, whose prompts may hold learned tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthquant.core.device import resolve_device
from synthquant.core.errors import ModelError, UnsupportedModelError
from synthquant.diffusion.embedding import Embedding, read_embedding
from synthquant.diffusion.library import (
    DENOISERS,
    Precision,
    conditioning_of,
    load_pipeline,
    pipeline_class,
    pipeline_index,
    pipeline_location,
    precision,
    quiet,
    scheduler_like,
    without_checker,
)
from synthquant.diffusion.pipelines import DiffusionPipeline
from synthquant.diffusion.quantized import checkpoint_of, load_quantized


class TextToImagePipeline(DiffusionPipeline):
    """An opened pipeline that reads prompts, which may hold learned tokens."""

    def __init__(self, pipeline: Any, name: str, device: torch.device) -> None:
        super().__init__(pipeline, name, device)
        self._added: list[Tensor] = []

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over the weights as they were loaded, precision included, the scheduler's settings, and
        the embeddings that were added.
        """
        digest = hashlib.sha256(self._opened.encode())
        for vectors in self._added:
            digest.update(vectors.numpy().tobytes())
        return digest.hexdigest() if self._added else self._opened

    def load_embedding(self, path: Path) -> str:
        """Load a textual-inversion embedding and return the token that stands for it in prompts.

        Raises `ModelError` if the file is none or has another width than the text encoder, `UnsupportedModelError` if
        the pipeline takes none.
        """
        return self.add_embedding(read_embedding(path), str(path))

    def add_embedding(self, embedding: Embedding, where: str) -> str:
        """Give the text encoder a new token; returns it. Raises as `load_embedding` does."""
        if not hasattr(self.pipeline, "load_textual_inversion") or hasattr(self.pipeline, "text_encoder_2"):
            raise UnsupportedModelError(
                f"{self.name} ({type(self.pipeline).__name__}) has not one text encoder, for which {where} was made;"
                " use a Stable Diffusion pipeline or leave the embedding out"
            )
        width = self.pipeline.text_encoder.get_input_embeddings().weight.shape[1]
        if embedding.vectors.shape[1] != width:
            raise ModelError(
                f"{where} holds an embedding of width {embedding.vectors.shape[1]}, the text encoder of {self.name} has"
                f" width {width}; tune one for this generator"
            )
        if embedding.token in self.pipeline.tokenizer.get_vocab():
            raise ModelError(f"{where} is for the token {embedding.token!r}, which {self.name} already has")
        _ = self._opened  # before the text encoder's table grows
        with quiet():
            self.pipeline.load_textual_inversion({embedding.token: embedding.vectors})
        self._texts.clear()
        self._added.append(embedding.vectors.cpu())
        return embedding.token


def open_text_to_image(
    source: str,
    *,
    device: torch.device | str = "cpu",
    dtype: Precision = "auto",
    scheduler: str | None = None,
    safety_checker: bool = True,
    compiled: bool = False,
) -> TextToImagePipeline:
    """Open a diffusers text-to-image pipeline: a folder, `zoo/NAME`, a name on the hub, or a quantized one's run.

    `dtype` "auto" is float16 on an accelerator and float32 on a CPU. `scheduler` replaces the pipeline's own by one of
    `SCHEDULERS` or of diffusers, with the same noise schedule. Without `safety_checker` the pipeline's one, if it has
    one, is not loaded. `compiled` hands the denoiser to `torch.compile`. Weights are read from safetensors only.

    A quantized pipeline, named by its run or by the folder that `--to diffusers` wrote, computes in float32 and has no
    safety checker.

    Raises `ModelError` if there is no such pipeline or it cannot be read, `UnsupportedModelError` if it is not
    text-to-image, `UnknownNameError` for the scheduler, `MissingExtraError` if diffusers is not installed, `InputError`
    if the device cannot be used.
    """
    place = torch.device(resolve_device(str(device)))
    if checkpoint_of(source) is not None:
        pipeline = load_quantized(source, place, dtype)
        _require_prompts(type(pipeline), source)
    else:
        location = pipeline_location(source)
        cls = pipeline_class(pipeline_index(location, source), source)
        _require_prompts(cls, source)
        options = {"dtype": precision(dtype, place), **without_checker(cls, safety_checker)}
        pipeline = load_pipeline(cls, location, source, **options)
    if scheduler is not None:
        pipeline.scheduler = scheduler_like(pipeline.scheduler, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    opened = TextToImagePipeline(pipeline, source, place)
    opened.to(place)
    for part in DENOISERS if compiled else ():
        if isinstance(getattr(pipeline, part, None), nn.Module):
            getattr(pipeline, part).compile()
    return opened


def _require_prompts(cls: Any, source: str) -> None:
    if conditioning_of(cls, source) != "prompts":
        raise UnsupportedModelError(f"{source} is a {cls.__name__}, not a text-to-image pipeline; choose another one")
