"""The architecture of Stable Diffusion v1-5 at full size with random weights, through the commands that users type.

    python benchmarks/stable_diffusion.py --work FOLDER --out results/stable_diffusion/cpu.json
    python benchmarks/stable_diffusion.py --work FOLDER --device cuda --dtype float16 --tuning-batch 8 --steps 50 \
        --speed-batches 1 8 32 --speed-steps 20 50 --compiled --out results/stable_diffusion/cuda.json

Writes the pipeline to FOLDER (2.1 GB in half precision), tunes a prompt for a few steps and draws images with it, each as
a process of its own whose time and memory are measured; then, with `--speed-batches`, measures images per second. The sizes
are those of the published configuration files. The weights are random: images and token mean nothing, time and memory do.
There is no safety checker, and the tokenizer has a smaller vocabulary than CLIP's.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from synthquant.core.files import write_json
from synthquant.core.record import environment
from synthquant.data.image_set import ImageSet
from synthquant.data.sources import open_images
from synthquant.diffusion.pipelines import Sampling
from synthquant.diffusion.text_to_image import open_text_to_image
from synthquant.synthesize.prompts import TEMPLATES

ROOT = Path(__file__).parents[1]


def build(folder: Path) -> dict[str, int]:
    """Write the pipeline in half precision; returns the parameters of its networks."""
    sys.path.append(str(ROOT / "training"))
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from prompts import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=0.18215,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=768,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.mul_(4)  # else random weights draw gray, which is drawn again
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = PNDMScheduler(**noise, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    networks = {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder}
    pipeline = StableDiffusionPipeline(
        **{name: network.eval().half() for name, network in networks.items()},
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return {name: sum(value.numel() for value in network.parameters()) for name, network in networks.items()}


def command(*arguments: object) -> dict[str, Any]:
    """Run `synthquant` with these arguments; returns its JSON, and its seconds and peak memory from /proc."""
    started = time.perf_counter()
    line = [sys.executable, "-c", "from synthquant.cli import main; main()", *map(str, arguments), "--json"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    result: dict[str, Any] = json.loads(output)
    return result | {"seconds": round(time.perf_counter() - started, 1), "peak_memory_bytes": usage.ru_maxrss * 1024}


def speed(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Images per second at 512x512, each batch size and number of steps, after one batch that does not count."""
    rows = []
    for compiled in [False, True] if args.compiled else [False]:
        for batch in args.speed_batches:
            generator = open_text_to_image(str(folder), device=args.device, dtype=args.dtype, compiled=compiled)
            prompts = [TEMPLATES[index % len(TEMPLATES)].format("ship") for index in range(batch)]
            for steps in args.speed_steps:
                seconds = []
                if args.device != "cpu":
                    torch.cuda.reset_peak_memory_stats()
                for repeat in range(args.repeats + 1):
                    started = time.perf_counter()
                    generator.draw(prompts, [1000 * repeat + index for index in range(batch)], Sampling(steps=steps))
                    seconds.append(time.perf_counter() - started)  # images are on the CPU: nothing is left to wait for
                row = {
                    "batch": batch,
                    "steps": steps,
                    "compiled": compiled,
                    "images_per_second": round(batch * args.repeats / sum(seconds[1:]), 4),
                    "first_batch_seconds": round(seconds[0], 1),
                    "peak_memory_bytes": None if args.device == "cpu" else torch.cuda.max_memory_allocated(),
                }
                print(json.dumps(row), flush=True)
                rows.append(row)
            del generator
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the pipeline; it is kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=512, help="height and width of the images that are drawn")
    parser.add_argument("--steps", type=int, default=2, help="of the images that are drawn by the command")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--tuning-steps", type=int, default=2)
    parser.add_argument("--tuning-batch", type=int, default=1)
    parser.add_argument("--speed-batches", type=int, nargs="*", default=[])
    parser.add_argument("--speed-steps", type=int, nargs="*", default=[20, 50])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="measure speed with torch.compile too")
    args = parser.parse_args()

    folder, token, images = args.work / "pipeline", args.work / "token.safetensors", args.work / "images"
    result: dict[str, Any] = {"environment": environment(args.device), "dtype": args.dtype}
    started = time.perf_counter()
    if not (folder / "model_index.json").is_file():
        result["parameters"] = build(folder)
        result["build_and_save_seconds"] = round(time.perf_counter() - started, 1)
    for left in (images, args.work / "few"):
        shutil.rmtree(left, ignore_errors=True)
    token.unlink(missing_ok=True)
    real = open_images("bundled/cifar10-test")
    assert real.labels is not None
    chosen = [int((real.labels == label).nonzero()[0]) for label in (0, 1)]
    ImageSet.from_tensors(torch.stack([real[index].image for index in chosen]), torch.tensor([0, 1])).save(
        args.work / "few"
    )
    (args.work / "two.txt").write_text("airplane\nautomobile\n")
    common = ("--device", args.device)
    result["tune_prompt"] = command(
        *("tune-prompt", folder, "--images", args.work / "few", "--classes", args.work / "two.txt", "--out", token),
        *("--dtype", args.dtype, "--set", f"iterations={args.tuning_steps}", "--set", "flip=false"),
        *("--set", f"batch_size={args.tuning_batch}", *common),
    ) | {"steps": args.tuning_steps, "batch": args.tuning_batch, "size": 512}
    print(json.dumps(result["tune_prompt"]), flush=True)
    result["synthesize"] = command(
        *("synthesize", "zoo/cifar10-resnet20", "--method", "text_to_image", "--count", args.count, "--out", images),
        *("--set", f"generator={folder}", "--set", f"embedding={token}", "--set", f"steps={args.steps}"),
        *("--set", f"height={args.size}", "--set", f"width={args.size}", "--set", f"dtype={args.dtype}", *common),
    ) | {"steps": args.steps, "size": args.size}
    for key in ("tune_prompt", "synthesize"):
        result[key].pop("out")
    print(json.dumps(result["synthesize"]), flush=True)
    result["speed"] = speed(folder, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
