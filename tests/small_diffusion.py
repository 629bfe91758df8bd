"""Pipelines of diffusers of the smallest size with random weights, beside the one of `small_pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from prompts import build_tokenizer
from synthquant.diffusion.denoiser import Denoiser
from synthquant.diffusion.library import quiet
from synthquant.diffusion.pipelines import DiffusionPipeline, Sampling
from synthquant.models.float_model import ModelSource

CPU = torch.device("cpu")
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def unet(seed: int = 0, **options: Any) -> diffusers.UNet2DModel:
    """Of 8x8 images in three channels, with a shortcut that is joined by channels, and attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=8,
            **options,
        ).eval()


def autoencoder(seed: int = 1) -> diffusers.AutoencoderKL:
    """Of 16x16 images and 8x8 latents in four channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        ).eval()


def ddim(seed: int = 0) -> diffusers.DDIMPipeline:
    """Unconditional, without noise in its steps."""
    return diffusers.DDIMPipeline(unet(seed), diffusers.DDIMScheduler(**NOISE))


def ddpm(seed: int = 0) -> diffusers.DDPMPipeline:
    """Unconditional, with noise in its steps."""
    return diffusers.DDPMPipeline(unet(seed), diffusers.DDPMScheduler(**NOISE))


def dit(seed: int = 0, scheduler: str = "DDIMScheduler") -> diffusers.DiTPipeline:
    """Of 16x16 images of a thousand classes, drawn as 8x8 latents by a transformer that predicts variances too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_num_groups=4,
        ).eval()
        for block in transformer.transformer_blocks:  # untrained, it would hardly read classes and times
            block.norm1.linear.weight.data.mul_(30)
    return diffusers.DiTPipeline(transformer, autoencoder(), getattr(diffusers, scheduler)(**NOISE))


def latent(seed: int = 0) -> diffusers.LDMTextToImagePipeline:
    """Latent diffusion as it was before Stable Diffusion, with a text encoder of its own and other names of parts."""
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    tokenizer = build_tokenizer()
    options = {"encoder_ffn_dim": 16, "encoder_attention_heads": 2, "head_dim": 4, "d_model": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = LDMBertModel(LDMBertConfig(len(tokenizer), 77, encoder_layers=1, **options))
        denoiser = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            norm_num_groups=4,
            attention_head_dim=8,
        )
    return diffusers.LDMTextToImagePipeline(
        vqvae=autoencoder(),
        bert=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=denoiser.eval(),
        scheduler=diffusers.DDIMScheduler(**NOISE),
    )


def denoiser(pipeline: Any) -> Denoiser:
    """As `open_model` returns it."""
    around = opened(pipeline)
    module = around.denoiser.requires_grad_(False)
    source = ModelSource(source="diffusers/small", task="denoise")
    return Denoiser(module, around.first_call(Sampling(steps=2)), "small", source, "denoise", pipeline=around)


def opened(pipeline: Any) -> DiffusionPipeline:
    """As `open_pipeline` returns it."""
    pipeline.set_progress_bar_config(disable=True)
    return DiffusionPipeline(pipeline, "small", CPU)


def saved(pipeline: Any, folder: Path) -> Path:
    """Write a pipeline where `from_pretrained` finds it."""
    with quiet():
        pipeline.save_pretrained(folder)
    return folder
