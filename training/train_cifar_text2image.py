"""Train a small text-to-image model of CIFAR-10 and write it as a folder that `StableDiffusionPipeline` opens.

    python training/train_cifar_text2image.py --train TRAIN.parquet --out FOLDER

It has all the parts of Stable Diffusion, each small: a tokenizer and a CLIP text encoder, an autoencoder to 6 x 16 x 16
latents, and a conditional UNet. The autoencoder is trained first; then text encoder and UNet are trained together to
predict noise, from the second half of the training images (`--half`), with prompts of the 27 templates of GenQ, one in ten of the
style template, and one in ten empty, for guidance. What is saved is a moving average of the weights, in half precision.

Both trainings resume from files in FOLDER; `--minutes` stops cleanly so that the next call continues, and
`--total-minutes` ends the second one after a time instead of after `--steps`. The pipeline is in
`FOLDER/cifar10-text2image`.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from autoencoder import LATENT_CHANNELS, AutoencoderTrainer, build_autoencoder, encode_all, restored_psnr, scale_latents
from cifar import HALVES, ORIGIN, load
from generators import MIN_SNR, NOISE, Denoising, count_parameters, save_pipeline
from prompts import MAX_TOKENS, STYLES, build_tokenizer, encode, style_levels
from schedule import Schedule, add_arguments, describe_run, train
from synthquant.models.zoo import CIFAR10_CLASSES
from synthquant.synthesize.prompts import STYLE_TEMPLATE, TEMPLATES

NAME = "cifar10-text2image"


@dataclass(frozen=True)
class Size:
    """Widths of the parts."""

    text: int
    text_layers: int
    unet: tuple[int, int]
    unet_layers: int
    autoencoder: tuple[int, int]
    attention: int = 0
    """Which of the UNet's two levels reads the text."""


SIZES = {
    "small": Size(text=128, text_layers=2, unet=(96, 144), unet_layers=2, autoencoder=(32, 64)),
    # For hours on one core of a CPU: attention over 64 places instead of 256 halves the time of an image.
    "cpu": Size(text=64, text_layers=1, unet=(32, 96), unet_layers=1, autoencoder=(16, 32), attention=1),
    "tiny": Size(text=16, text_layers=1, unet=(16, 24), unet_layers=1, autoencoder=(16, 16)),
}
EMPTY_SHARE, STYLE_SHARE = 0.1, 0.1


def build_text_encoder(size: Size, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.text,
            intermediate_size=4 * size.text,
            projection_dim=size.text,
            num_hidden_layers=size.text_layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(size: Size) -> UNet2DConditionModel:
    """Two levels, 16x16 and 8x8, one with attention to the text, and 8x8 with it in the middle."""
    down = ["DownBlock2D", "DownBlock2D"]
    down[size.attention] = "CrossAttnDownBlock2D"
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=size.unet,
        layers_per_block=size.unet_layers,
        down_block_types=tuple(down),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        norm_num_groups=size.unet[0] // 8,
        attention_head_dim=4,
        cross_attention_dim=size.text,
    )


class Prompts:
    """Token ids of every prompt that training can meet, drawn by class and by what the image looks like."""

    def __init__(self, tokenizer: CLIPTokenizer, device: torch.device) -> None:
        words = [word for row in STYLES for word in row]
        by_template = [template.format(name) for name in CIFAR10_CLASSES for template in TEMPLATES]
        by_style = [STYLE_TEMPLATE.format(name, word) for name in CIFAR10_CLASSES for word in words]
        count = len(CIFAR10_CLASSES)
        self.by_template = encode(tokenizer, by_template).view(count, len(TEMPLATES), -1).to(device)
        self.by_style = encode(tokenizer, by_style).view(count, len(STYLES), 3, -1).to(device)
        self.empty = encode(tokenizer, [""]).to(device)

    def draw(self, labels: Tensor, levels: Tensor) -> Tensor:
        """Token ids `[B, MAX_TOKENS]` for labels `[B]` and style levels `[B, len(STYLES)]`."""
        count, device = len(labels), labels.device
        template = torch.randint(0, len(TEMPLATES), (count,), device=device)
        row = torch.randint(0, len(STYLES), (count,), device=device)
        level = levels.gather(1, row[:, None])[:, 0]
        kind = torch.rand(count, 1, device=device)
        ids = torch.where(
            kind < STYLE_SHARE + EMPTY_SHARE, self.by_style[labels, row, level], self.by_template[labels, template]
        )
        return torch.where(kind < EMPTY_SHARE, self.empty, ids)


class TextToImageTrainer:
    """UNet and text encoder, on latents that were made once."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, prompts: Prompts,
        moments: Tensor, scaling: float, labels: Tensor, levels: Tensor,
        device: torch.device, batch_size: int, lr: float, compiled: bool,
    ) -> None:  # fmt: skip
        self.unet = unet.to(device, memory_format=torch.channels_last)
        self.text_encoder = text_encoder.to(device)
        self.prompts, self.moments, self.scaling = prompts, moments, scaling
        # Moments of an image and of its mirror image lie one after the other.
        self.labels, self.levels = (value.to(device).repeat(2, *[1] * (value.ndim - 1)) for value in (labels, levels))
        self.batch_size, self.device = batch_size, device
        self.denoising = Denoising([self.unet, self.text_encoder], device, lr, average_decay=0.9995)
        if compiled:
            self.unet.compile()

    def begin_round(self) -> None:
        self.denoising.train_mode()

    def step(self, rate: float) -> Tensor:
        index = torch.randint(0, len(self.moments), (self.batch_size,), device=self.device)
        mean, std = self.moments[index].float().chunk(2, 1)
        latents = self.scaling * (mean + std * torch.randn_like(mean))
        ids = self.prompts.draw(self.labels[index], self.levels[index])

        def predict(noisy: Tensor, times: Tensor) -> Tensor:
            text = self.text_encoder(ids)[0]
            noise: Tensor = self.unet(noisy, times, text, return_dict=False)[0]
            return noise

        return self.denoising.step(latents, predict, rate)

    def state_dict(self) -> dict[str, Any]:
        return self.denoising.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.denoising.load_state_dict(state)


def train_autoencoder(
    args: argparse.Namespace, size: Size, images: Tensor, device: torch.device
) -> tuple[AutoencoderKL, Schedule, bool]:
    """Train it, or read it from its state; returns it, how long it took and whether it is done."""
    model = build_autoencoder(size.autoencoder)
    trainer = AutoencoderTrainer(model, images, device, batch_size=min(256, args.batch_size))
    minutes = args.autoencoder_minutes
    schedule = Schedule(None if minutes else args.autoencoder_steps, minutes)
    done = train(
        trainer, schedule, args.out / f"{NAME}.autoencoder.pt", round_steps=args.round_steps, seed=args.seed,
        call_minutes=args.minutes, save_seconds=args.save_seconds,
    )  # fmt: skip
    return model, schedule, done


def build_trainer(
    args: argparse.Namespace, size: Size, autoencoder: AutoencoderKL, images: Tensor, labels: Tensor
) -> TextToImageTrainer:
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    text_encoder, unet = build_text_encoder(size, tokenizer), build_unet(size)
    moments = torch.cat([encode_all(autoencoder, images), encode_all(autoencoder, images.flip(3))])
    scaling = scale_latents(autoencoder, moments)
    return TextToImageTrainer(
        unet, text_encoder, Prompts(tokenizer, device), moments, scaling, labels, style_levels(images),
        device, args.batch_size, args.lr, args.compile,
    )  # fmt: skip


def build_pipeline(trainer: TextToImageTrainer, autoencoder: AutoencoderKL) -> StableDiffusionPipeline:
    """The averaged weights as a pipeline; training cannot go on with `trainer`."""
    trainer.denoising.average.copy_to_parameters()
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=autoencoder.eval(), text_encoder=trainer.text_encoder.eval(), tokenizer=build_tokenizer(),
        unet=trainer.unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def write_card(
    args: argparse.Namespace, trainer: TextToImageTrainer, autoencoder: AutoencoderKL, images: Tensor,
    schedules: tuple[Schedule, Schedule],
) -> dict[str, Any]:  # fmt: skip
    first, second = schedules
    part = args.half if args.half == "all" else f"{args.half} half"
    return {
        "name": NAME,
        "architecture": f"StableDiffusionPipeline at 32x32: UNet2DConditionModel ({count_parameters(trainer.unet)}), "
        f"CLIP text encoder ({count_parameters(trainer.text_encoder)}), AutoencoderKL to 6x16x16 "
        f"({count_parameters(autoencoder)})",
        "data": f"training images ({part}: {len(images)}) of {ORIGIN}; random flip",
        "prompts": f"the {len(TEMPLATES)} templates of GenQ (appendix B) with the class name; {STYLE_SHARE:.0%} "
        f"{STYLE_TEMPLATE.format('CLASS', 'WORD')!r} with a word for brightness, saturation or contrast; "
        f"{EMPTY_SHARE:.0%} empty",
        "noise": NOISE,
        "schedule": f"AdamW (0.9, 0.99), weight decay 0.01, learning rate {args.lr}, batches of {args.batch_size}, "
        f"Min-SNR-{MIN_SNR:g} weights, linear warm-up over 5%, then cosine to zero; moving average of the weights "
        "0.9995, which is what is saved",
        "autoencoder": {
            "steps": first.step,
            "seconds": round(first.seconds),
            "scaling_factor": autoencoder.config.scaling_factor,
            "psnr_training_images": round(restored_psnr(autoencoder, images[:5000]), 2),
        },
        **describe_run(second, args.seed, trainer.device),
        "retrain": f"python training/train_cifar_text2image.py --half {args.half} --size {args.size} "
        f"--autoencoder-steps {first.step} --steps {second.step} --batch-size {args.batch_size} --lr {args.lr} "
        f"--seed {args.seed} --train TRAIN.parquet --out FOLDER",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--half", choices=HALVES, default="second", help="which training images")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=20_000, help="length of training, if not --total-minutes")
    parser.add_argument("--autoencoder-steps", type=int, default=3000)
    parser.add_argument("--autoencoder-minutes", type=float, help="length of its training instead of its steps")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--round-steps", type=int, default=100, help="steps between two lines of output")
    add_arguments(parser)
    args = parser.parse_args()

    torch.backends.cudnn.benchmark = True
    began, device, size = time.monotonic(), torch.device(args.device), SIZES[args.size]
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels = load(args.train, args.half, args.limit)
    torch.manual_seed(args.seed)
    autoencoder, first, done = train_autoencoder(args, size, images, device)
    if not done:
        return
    print(f"autoencoder: {restored_psnr(autoencoder, images[:5000]):.2f} dB on training images", flush=True)
    trainer = build_trainer(args, size, autoencoder, images, labels)
    second = Schedule(None if args.total_minutes else args.steps, args.total_minutes)
    left = args.minutes - (time.monotonic() - began) / 60
    done = train(
        trainer, second, args.out / f"{NAME}.state.pt", round_steps=args.round_steps, seed=args.seed + 1,
        call_minutes=max(0.0, left) if math.isfinite(left) else left, save_seconds=args.save_seconds,
    )  # fmt: skip
    if not done:
        return
    card = write_card(args, trainer, autoencoder, images, (first, second))
    save_pipeline(build_pipeline(trainer, autoencoder), card, args.out / NAME)
    print(json.dumps(card))


if __name__ == "__main__":
    main()
