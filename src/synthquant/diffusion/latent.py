"""Stable Diffusion in its parts: images to latents, prompts with a free vector to text, noise prediction."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from synthquant.core.errors import InputError, UnsupportedModelError
from synthquant.diffusion.library import quiet
from synthquant.diffusion.text_to_image import TextToImagePipeline

_NEEDED = ("unet", "vae", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Tokens:
    """Prompts in which one token is a vector that no table holds."""

    ids: Tensor
    """int64 `[K, L]`; where the free token stands, the id is that of any other token."""
    places: Tensor
    """bool `[K, L]`, true where the free token stands."""

    def rows(self, index: Tensor) -> Tokens:
        """Return the prompts at these positions."""
        return Tokens(self.ids[index], self.places[index])


class LatentDiffusion:
    """The networks of an opened Stable Diffusion pipeline, frozen.

    Raises `UnsupportedModelError` for pipelines of another build: two text encoders, no U-Net, no noise schedule of the
    variance-preserving kind, or a U-Net that is told the guidance scale.
    """

    def __init__(self, generator: TextToImagePipeline) -> None:
        pipeline, name = generator.pipeline, generator.name
        missing = [part for part in _NEEDED if getattr(pipeline, part, None) is None]
        schedule = getattr(pipeline.scheduler, "alphas_cumprod", None)
        kind = pipeline.scheduler.config.get("prediction_type", "epsilon")
        if (
            missing
            or hasattr(pipeline, "text_encoder_2")
            or schedule is None
            or kind not in ("epsilon", "v_prediction")
        ):
            raise UnsupportedModelError(
                f"{name} ({type(pipeline).__name__}) is not of the build of Stable Diffusion 1 and 2, for which prompts"
                " can be tuned"
            )
        if pipeline.unet.config.get("time_cond_proj_dim") is not None:
            raise UnsupportedModelError(
                f"{name} is distilled for a few steps; tune a prompt for the model it was made from"
            )
        self.name = name
        self.device = generator.device
        self._unet, self._vae = pipeline.unet, pipeline.vae
        self._encoder, self._tokenizer = pipeline.text_encoder, pipeline.tokenizer
        for network in (self._unet, self._vae, self._encoder):
            network.eval().requires_grad_(False)
        self._predicts_velocity = kind == "v_prediction"
        self._signal: Tensor = schedule.to(self.device, torch.float32)
        self._extra = int(pipeline.vae_scale_factor)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the U-Net."""
        dtype: torch.dtype = self._unet.dtype
        return dtype

    @property
    def width(self) -> int:
        """Length of a token's embedding."""
        return int(self._encoder.get_input_embeddings().weight.shape[1])

    @property
    def timesteps(self) -> int:
        """Steps of the noise schedule that the U-Net was trained with."""
        return len(self._signal)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pipeline's images in pixels."""
        size = self._unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self._extra, width * self._extra

    def save_memory(self) -> None:
        """Keep no activations of the U-Net for the backward pass but compute them again."""
        self._unet.enable_gradient_checkpointing()

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of images in -1..1: `[B, 3, H, W]` to float32 `[B, 2C, h, w]`.

        Scaled as the U-Net wants them. The autoencoder runs in float32.
        """
        dtype = self._vae.dtype
        with quiet():
            self._vae.to(torch.float32)
            try:
                posterior = self._vae.encode(images.to(self.device, torch.float32)).latent_dist
            finally:
                self._vae.to(dtype)
        factor, shift = self._vae.config.scaling_factor, self._vae.config.get("shift_factor") or 0.0
        return torch.cat([(posterior.mean - shift) * factor, posterior.std * factor], 1)

    def tokenize(self, prompts: Sequence[str], token: str) -> Tokens:
        """Tokens of prompts that hold `token`, padded as the pipeline pads them.

        Raises `InputError` if the tokenizer knows the token already, or cuts it off the end of a prompt.
        """
        if token in self._tokenizer.get_vocab():
            raise InputError(f"{self.name} already has the token {token!r}; choose another")
        with quiet():
            tokenizer = copy.deepcopy(self._tokenizer)
            tokenizer.add_tokens([token])
            length = tokenizer.model_max_length
            ids = torch.tensor(
                tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True).input_ids
            )
        places = ids == tokenizer.convert_tokens_to_ids(token)
        for row, prompt in enumerate(prompts):
            if not bool(places[row].any()):
                raise InputError(f"prompt {prompt!r} is longer than the {length} tokens that {self.name} reads")
        return Tokens(ids.masked_fill(places, 0).to(self.device), places.to(self.device))

    def word_vector(self, word: str) -> Tensor:
        """Mean of the embeddings of a word's tokens, float32 `[width]`; raises `InputError` for an empty word."""
        ids = self._tokenizer(word, add_special_tokens=False).input_ids
        if not ids:
            raise InputError(f"{word!r} is no word to start from; give one, for example 'imagenet'")
        table = self._encoder.get_input_embeddings().weight
        mean: Tensor = table[torch.tensor(ids, device=table.device)].detach().float().mean(0)
        return mean

    def text(self, tokens: Tokens, vector: Tensor) -> Tensor:
        """Text embeddings `[K, L, D]` with `vector` `[width]` for the free token; gradients flow to it."""

        def put_in(module: Any, inputs: tuple[Tensor, ...], rows: Tensor) -> Tensor:
            del module, inputs
            return torch.where(tokens.places[..., None], vector.to(rows.dtype), rows)

        handle = self._encoder.get_input_embeddings().register_forward_hook(put_in)
        try:
            embeddings: Tensor = self._encoder(tokens.ids)[0]
        finally:
            handle.remove()
        return embeddings

    def loss(self, latents: Tensor, noise: Tensor, times: Tensor, text: Tensor) -> Tensor:
        """Mean squared error of the prediction (noise, or velocity where the U-Net predicts that); a scalar.

        `latents` and `noise` are float32 `[B, C, h, w]`, `times` int64 `[B]`, `text` `[B, L, D]`.
        """
        kept = self._signal[times].view(-1, 1, 1, 1)
        noised = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        predicted = self._unet(noised.to(self._unet.dtype), times, encoder_hidden_states=text.to(self._unet.dtype))[0]
        wanted = kept.sqrt() * noise - (1 - kept).sqrt() * latents if self._predicts_velocity else noise
        loss: Tensor = (predicted.float() - wanted).square().mean()
        return loss
