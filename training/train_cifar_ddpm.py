"""Train a small unconditional diffusion model of CIFAR-10 and write it as a folder that diffusers opens.

    python training/train_cifar_ddpm.py --train TRAIN.parquet --out FOLDER

A UNet in pixel space (arXiv:2006.11239) of three levels, one of them with attention, whose upward path reads the
downward path's features by concatenation. What is saved is a moving average of the weights, in half precision.

Training resumes from `FOLDER/cifar10-ddpm.state.pt`; `--minutes` stops cleanly so that the next call continues, and
`--total-minutes` ends it after a time instead of after `--steps`. The pipeline is in `FOLDER/cifar10-ddpm`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from autoencoder import as_input
from cifar import HALVES, ORIGIN, load
from generators import MIN_SNR, NOISE, Denoising, count_parameters, save_pipeline
from schedule import Schedule, add_arguments, describe_run, train

NAME = "cifar10-ddpm"


@dataclass(frozen=True)
class Size:
    """Channels of the three levels and residual blocks of each."""

    channels: tuple[int, int, int]
    layers: int
    attention: int = 1
    """Which of the levels has attention: 32x32, 16x16 or 8x8."""


SIZES = {
    "small": Size((64, 96, 96), 2),
    # For less than an hour on one core of a CPU, where attention over 8x8 places costs least.
    "cpu": Size((16, 48, 96), 1, attention=2),
    "tiny": Size((16, 16, 16), 1),
}


def build_unet(size: Size) -> UNet2DModel:
    """Levels of 32x32, 16x16 and 8x8, one of them with attention, and attention in the middle."""
    down = ["DownBlock2D"] * 3
    down[size.attention] = "AttnDownBlock2D"
    return UNet2DModel(
        sample_size=32,
        block_out_channels=size.channels,
        layers_per_block=size.layers,
        down_block_types=tuple(down),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        attention_head_dim=min(32, size.channels[0]),
        norm_num_groups=size.channels[0] // 8,
    )


class DdpmTrainer:
    """The UNet on images and their mirror images."""

    def __init__(
        self, unet: UNet2DModel, images: Tensor, device: torch.device, batch_size: int, lr: float, compiled: bool
    ) -> None:
        self.unet = unet.to(device, memory_format=torch.channels_last)
        self.images, self.device, self.batch_size = images.to(device), device, batch_size
        self.denoising = Denoising([self.unet], device, lr, average_decay=0.9995)
        if compiled:
            self.unet.compile()

    def begin_round(self) -> None:
        self.denoising.train_mode()

    def step(self, rate: float) -> Tensor:
        index = torch.randint(0, len(self.images), (self.batch_size,), device=self.device)
        images = as_input(self.images[index])
        images = torch.where(torch.rand(len(images), 1, 1, 1, device=self.device) < 0.5, images, images.flip(3))

        def predict(noisy: Tensor, times: Tensor) -> Tensor:
            noise: Tensor = self.unet(noisy, times, return_dict=False)[0]
            return noise

        return self.denoising.step(images, predict, rate)

    def state_dict(self) -> dict[str, Any]:
        return self.denoising.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.denoising.load_state_dict(state)


def build_pipeline(trainer: DdpmTrainer) -> DDIMPipeline:
    """The averaged weights as a pipeline; training cannot go on with `trainer`."""
    trainer.denoising.average.copy_to_parameters()
    return DDIMPipeline(unet=trainer.unet.eval(), scheduler=DDIMScheduler(**NOISE, clip_sample=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--half", choices=HALVES, default="all", help="which training images")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=20_000, help="length of training, if not --total-minutes")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--round-steps", type=int, default=100, help="steps between two lines of output")
    add_arguments(parser)
    args = parser.parse_args()

    torch.backends.cudnn.benchmark = True
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    images, _ = load(args.train, args.half, args.limit)
    torch.manual_seed(args.seed)
    trainer = DdpmTrainer(build_unet(SIZES[args.size]), images, device, args.batch_size, args.lr, args.compile)
    schedule = Schedule(None if args.total_minutes else args.steps, args.total_minutes)
    done = train(
        trainer, schedule, args.out / f"{NAME}.state.pt", round_steps=args.round_steps, seed=args.seed,
        call_minutes=args.minutes, save_seconds=args.save_seconds,
    )  # fmt: skip
    if not done:
        return
    card = {
        "name": NAME,
        "architecture": f"DDIMPipeline at 32x32: UNet2DModel ({count_parameters(trainer.unet)}), attention at "
        f"{(side := 32 >> SIZES[args.size].attention)}x{side}, concatenated shortcuts",
        "data": f"training images ({args.half}: {len(images)}) of {ORIGIN}; random flip",
        "noise": NOISE,
        "schedule": f"AdamW (0.9, 0.99), weight decay 0.01, learning rate {args.lr}, batches of {args.batch_size}, "
        f"Min-SNR-{MIN_SNR:g} weights, linear warm-up over 5%, then cosine to zero; moving average of the weights "
        "0.9995, which is what is saved",
        **describe_run(schedule, args.seed, device),
        "retrain": f"python training/train_cifar_ddpm.py --half {args.half} --size {args.size} --steps {schedule.step} "
        f"--batch-size {args.batch_size} --lr {args.lr} --seed {args.seed} --train TRAIN.parquet --out FOLDER",
    }
    save_pipeline(build_pipeline(trainer), card, args.out / NAME)
    print(json.dumps(card))


if __name__ == "__main__":
    main()
