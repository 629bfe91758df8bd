"""What the training of both diffusion models shares: the noise schedule, the optimisation step and the saved folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from schedule import Average, set_rate

# DDPM's linear schedule (arXiv:2006.11239): at its end next to nothing of the image is left, so that a sample begins
# where training ended.
NOISE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}


MIN_SNR = 5.0
"""Above this signal-to-noise ratio a time step weighs less: its noise is next to invisible and says nothing of what
the image shows (Min-SNR, arXiv:2303.09556, Eq. 10: faster training at equal quality)."""


class Denoising:
    """Optimiser, moving average and noise prediction for the networks of a diffusion model."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device, lr: float, average_decay: float) -> None:
        self.modules, self.device = list(modules), device
        parameters = [parameter for module in self.modules for parameter in module.parameters()]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=device.type == "cuda"
        )
        self.average = Average(self.modules, average_decay)
        self.alphas_cumprod = DDIMScheduler(**NOISE).alphas_cumprod.to(device)

    def train_mode(self) -> None:
        for module in self.modules:
            module.train()

    def step(self, clean: Tensor, predict: Callable[[Tensor, Tensor], Tensor], rate: float) -> Tensor:
        """One step on noised `clean` `[B, C, H, W]`; `predict(noisy, t)` returns the noise it sees."""
        times = torch.randint(0, len(self.alphas_cumprod), (len(clean),), device=self.device)
        signal = self.alphas_cumprod[times].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = (signal.sqrt() * clean + (1 - signal).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            predicted = predict(noisy, times)
        weight = (MIN_SNR * (1 - signal) / signal).clamp(max=1)
        loss = (weight * F.mse_loss(predicted.float(), noise, reduction="none")).mean()
        set_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.average.update()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "modules": [module.state_dict() for module in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for module, saved in zip(self.modules, state["modules"], strict=True):
            module.load_state_dict(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])


def save_pipeline(pipeline: DiffusionPipeline, card: dict[str, Any], folder: Path) -> None:
    """Write the pipeline in half precision with its card; the folder appears whole."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.cpu().half()
    pipeline.save_pretrained(temporary)
    _load_as_float32(temporary / "text_encoder" / "config.json")
    (temporary / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _load_as_float32(config: Path) -> None:
    """Make transformers load in the precision that diffusers loads in, not in that of the file."""
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def count_parameters(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters"
