"""A Stable Diffusion pipeline of the smallest size with random weights, which draws lively images in no time."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch

import train_cifar_text2image as text2image
from autoencoder import build_autoencoder
from generators import NOISE
from prompts import build_tokenizer

WIDTH = text2image.SIZES["tiny"].text


def build_small_pipeline(seed: int = 0) -> text2image.StableDiffusionPipeline:
    """32x32 images of the noise that goes in: its colours are far from gray."""
    size, tokenizer = text2image.SIZES["tiny"], build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = build_autoencoder(size.autoencoder)
        unet, text_encoder = text2image.build_unet(size), text2image.build_text_encoder(size, tokenizer)
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.mul_(2)
        # Random text encoders hardly tell prompts apart, and random U-Nets hardly read them.
        text_encoder.get_input_embeddings().weight.mul_(20)
    return text2image.StableDiffusionPipeline(
        vae=autoencoder.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=text2image.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_small_pipeline(folder: Path, seed: int = 0) -> Path:
    """Write it where `from_pretrained` finds it."""
    with redirect_stderr(io.StringIO()):
        build_small_pipeline(seed).save_pretrained(folder)
    return folder
