"""The small autoencoder of the text-to-image model: 3 x 32 x 32 pixels to 6 x 16 x 16 latents and back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from schedule import set_rate

LATENT_CHANNELS = 6
"""The JPEG files hold one colour for 2x2 pixels: four brightnesses and two colours are all there is in such a place."""


def build_autoencoder(channels: tuple[int, int]) -> AutoencoderKL:
    """One halving of the image; the scaling factor is set after training, by `scale_latents`."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=channels[0] // 8,
        sample_size=32,
        force_upcast=False,
    )


def as_input(images: Tensor) -> Tensor:
    """Pixels uint8 `[B, 3, H, W]` as the float range -1..1 that diffusers' pipelines use."""
    return images.float().div(127.5).sub(1)


class AutoencoderTrainer:
    """Mean absolute error, and a weak pull of the latents towards a normal distribution."""

    def __init__(
        self, model: AutoencoderKL, images: Tensor, device: torch.device, batch_size: int = 256, lr: float = 1e-3
    ) -> None:
        self.model = model.to(device, memory_format=torch.channels_last)
        self.images, self.device, self.batch_size = images.to(device), device, batch_size
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=device.type == "cuda")

    def begin_round(self) -> None:
        self.model.train()

    def step(self, rate: float) -> Tensor:
        index = torch.randint(0, len(self.images), (self.batch_size,), device=self.device)
        images = as_input(self.images[index])
        images = torch.where(torch.rand(len(images), 1, 1, 1, device=self.device) < 0.5, images, images.flip(3))
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            posterior = self.model.encode(images).latent_dist
            restored = self.model.decode(posterior.sample()).sample
        spread = posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        loss = F.l1_loss(restored.float(), images) + 1e-4 * 0.5 * spread.mean()
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


@torch.no_grad()
def encode_all(model: AutoencoderKL, images: Tensor, batch_size: int = 500) -> Tensor:
    """Mean and standard deviation of the latents of all images: `[N, 2 * LATENT_CHANNELS, H / 2, W / 2]`."""
    model.eval()
    device = next(model.parameters()).device
    found = []
    for batch in images.split(batch_size):
        posterior = model.encode(as_input(batch.to(device))).latent_dist
        found.append(torch.cat([posterior.mean, posterior.std], 1))
    return torch.cat(found)


def scale_latents(model: AutoencoderKL, moments: Tensor) -> float:
    """Set the scaling factor so that latents have a mean square of one, and return it."""
    mean, std = moments.chunk(2, 1)
    factor = round((mean.square() + std.square()).mean().rsqrt().item(), 5)
    model.register_to_config(scaling_factor=factor)
    return factor


@torch.no_grad()
def restored_psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Peak signal-to-noise ratio [dB] of images uint8 behind the autoencoder."""
    model.eval()
    device = next(model.parameters()).device
    errors = []
    for batch in images.split(500):
        restored = model.decode(model.encode(as_input(batch.to(device))).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((restored - as_input(batch.to(device))).div(2).square().mean((1, 2, 3)))
    return -10 * torch.cat(errors).mean().log10().item()
